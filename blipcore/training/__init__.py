"""How the models learn: objectives, data, the loop, and one runnable recipe a stage."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path


def recipe_names() -> list[str]:
    """The recipes, by the names of their files."""
    files = (Path(__file__).parent / "recipes").glob("*.py")
    return sorted(file.stem for file in files if not file.stem.startswith("_"))


def run_recipe(name: str, arguments: Sequence[str]) -> None:
    """Run a recipe's `main` with its own command line."""
    import_module(f"blipcore.training.recipes.{name}").main(list(arguments))


def describe_system(name: str) -> dict | None:
    """A system's parts and stages, as `family.describe`; None for a name that is no system's."""
    return import_module("blipcore.training.family").describe(name)


def finetune(source, **options):
    """Teach a model the captions of one library: `recipes/finetune_library.py` says what it takes and gives."""
    return import_module("blipcore.training.recipes.finetune_library").finetune(source, **options)

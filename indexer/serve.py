"""The warm process: `photoblip serve` keeps models and libraries loaded, and the commands ask it where it runs.

One process a user, on a socket that only this user reaches; it goes when nobody has asked for a while. Messages are
JSON behind their length, at most MAX_MESSAGE bytes. A command that gets no answer, for whatever reason, does the
work itself: the warm process changes how long a command takes, and nothing else. Starts free of torch and SQLAlchemy.
"""

import hashlib
import json
import os
import secrets
import socket
import socketserver
import stat
import struct
import subprocess
import sys
import sysconfig
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import chdir, closing, suppress
from contextvars import ContextVar
from pathlib import Path

from platformdirs import user_runtime_path

from blipcore.hub import KNOWN_MODELS
from indexer.config import LibraryPaths, default_library
from indexer.errors import ModelError, PhotoblipError

MAX_MESSAGE = 16 << 20
USAGE = 2  # the exit status of a wrong command line
HEADER = struct.Struct(">I")
CONNECT_SECONDS = 1.0
READ_SECONDS = 5.0  # for a message that has been announced
TURN_SECONDS = 5.0  # for another command's answer to be done
ANSWER_SECONDS = 600.0
MODEL_SETTINGS = ("PHOTOBLIP_MODELS", "CUDA_VISIBLE_DEVICES", "PHOTOBLIP_DEVICE_MAP", "PHOTOBLIP_QUANTIZE")
MAX_LIBRARIES = 3  # each holds its own model and index
TERMINAL_SETTINGS = ("TERM", "COLORTERM", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE")


class Unanswered(Exception):
    """The warm process gave no answer, for the reason in the message: the caller does the work itself."""


class NotRunning(Unanswered):
    """There is no warm process."""


# -- what both sides do with a library -----------------------------------------------------------------------


def _hits(hits) -> dict:
    understood = hits.query.summary() if hits.query else None
    return {
        "rows": [hit.as_dict() for hit in hits],
        "reranked": hits.reranked,
        "seconds": hits.seconds,
        "cut": hits.cut,
        "notice": hits.notice,
        "query": understood,
    }


def _search(photos, **options) -> dict:
    return _hits(photos.search(**options))


def _similar(photos, **options) -> dict:
    return _hits(photos.similar(**options))


def _describe(photos, **options) -> dict:
    return _hits(photos.describe(**options))


def _ask(photos, photo: str, **options) -> dict:
    photo_id = photos.photo_id(photo)
    return {"photo_id": photo_id, "answer": photos.ask(photo_id, **options)}


def _ask_results(photos, **options) -> dict:
    return {"rows": [group.as_dict() for group in photos.ask_results(**options)]}


COMMANDS = {
    "search": _search, "similar": _similar, "describe": _describe, "ask": _ask, "ask_results": _ask_results,
}  # fmt: skip
PATH_OPTION = {"search": "image", "similar": "photo", "describe": "image", "ask": "photo"}


def answer(library: Path | None, command: str, options: dict, note: Callable[[str], None] = lambda why: None) -> dict:
    """One of COMMANDS over a library, by the warm process where it answers, otherwise here.

    `PHOTOBLIP_SERVE=never` asks no other process; `auto` starts one for the next command where none runs.

    Args:
        library: its folder; the default one where None. options: JSON values for the method of `PhotoLibrary`.
        note: told why the warm process did not answer.

    Raises:
        PhotoblipError, ModelError: as the method of `PhotoLibrary`.
    """
    mode, running = os.environ.get("PHOTOBLIP_SERVE", ""), True
    folder = (library or default_library()).expanduser().absolute()
    if process := _answering.get():
        _check_answerable(folder, options)
        return process.answer(folder, command, options)
    try:
        if mode != "never":
            if why := _unanswered.get():
                raise why
            return _answered_elsewhere(folder, command, options)
    except Unanswered as why:
        running = not isinstance(why, NotRunning)
        note(str(why))
    from indexer import PhotoLibrary

    with PhotoLibrary.open(library, create=False, cold=True) as photos:
        answered = COMMANDS[command](photos, **options)
    if mode == "auto" and not running:
        start_detached(folder)
    return answered


_answering: ContextVar["WarmProcess | None"] = ContextVar("answering", default=None)  # this very process is warm
_unanswered: ContextVar[Unanswered | None] = ContextVar("unanswered", default=None)  # why it need not be asked again


def printed(arguments: list[str]) -> dict | None:
    """A command's exit "status" and the "pieces" that it prints, each with its stream: the warm process runs its line.

    This process then needs no parser and no console, which take longer to import than the answer takes. None: the
    command is to run here; its mistakes in usage are, too.
    """
    _unanswered.set(None)
    if os.environ.get("PHOTOBLIP_SERVE") == "never":
        return None
    command, *rest = arguments
    try:
        library = ["--library", str(default_library().expanduser().absolute())]  # what else the command line says wins
        line = [command, *library, *rest]
        return ask_server("print", arguments=line, folder=os.getcwd(), terminal=_terminal()) or None  # noqa: PTH109
    except (Unanswered, PhotoblipError, OSError) as why:
        _unanswered.set(why if isinstance(why, Unanswered) else Unanswered(str(why)))
        return None


def _terminal() -> dict:
    """What decides how a command prints: whether anybody sees it, how wide, in which colours."""
    width = os.environ.get("COLUMNS", "")
    for stream in (sys.__stdin__, sys.__stdout__, sys.__stderr__):
        with suppress(AttributeError, ValueError, OSError):
            width = width if width.isdigit() else str(os.get_terminal_size(stream.fileno()).columns)
    settings = {name: os.environ[name] for name in TERMINAL_SETTINGS if name in os.environ}
    seen = {"stdout": sys.stdout.isatty(), "stderr": sys.stderr.isatty()}
    return {**seen, "width": int(width) if width.isdigit() else 80, "environment": settings}


def _answered_elsewhere(folder: Path, command: str, options: dict) -> dict:
    """The warm process's answer; a path goes out whole, and an error comes back with the path as it was given."""
    path_option = PATH_OPTION.get(command)
    whole = given = options.get(path_option)
    if given is not None and not given.isdecimal():
        whole = os.path.abspath(os.path.expanduser(given))  # noqa: PTH100, PTH111 - strings, as the catalog has them
    _check_answerable(folder, options)
    try:
        sent = options if given is None else {**options, path_option: whole}
        return ask_server(command, library=str(folder), options=sent)
    except PhotoblipError as error:
        raise PhotoblipError(str(error).replace(str(whole), str(given))) from error


def _check_answerable(folder: Path, options: dict) -> None:
    """Raises Unanswered for what each command does by itself."""
    if not LibraryPaths(folder).catalog.exists():
        raise Unanswered("there is no library")
    if not {options.get("model"), options.get("ask_model")} <= {None, *KNOWN_MODELS}:
        raise Unanswered("a model folder is read anew each time")


def start_detached(folder: Path) -> None:
    """Start a warm process that outlives this one; it ends itself where another one runs."""
    command = [sys.executable, "-m", "indexer.cli", "serve", "--library", str(folder)]
    quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    flags = getattr(subprocess, "DETACHED_PROCESS", 0)
    home = Path(__file__).parents[1]
    subprocess.Popen(command, cwd=home, start_new_session=True, creationflags=flags, **quiet)


# -- messages ------------------------------------------------------------------------------------------------


def send(connection: socket.socket, message: dict) -> None:
    """Raises ValueError for a message over MAX_MESSAGE bytes."""
    data = json.dumps(message).encode("ascii")  # ASCII: names that are not UTF-8 survive as escapes
    if len(data) > MAX_MESSAGE:
        raise ValueError("the message is too large")
    connection.sendall(HEADER.pack(len(data)) + data)


def receive(connection: socket.socket) -> dict:
    """Raises EOFError where the other side is gone, ValueError where it sends no message or one that is too large."""
    (size,) = HEADER.unpack(_exactly(connection, HEADER.size))
    if size > MAX_MESSAGE:
        raise ValueError("the message is too large")
    message = json.loads(_exactly(connection, size))
    if not isinstance(message, dict):
        raise ValueError("the message is not an object")
    return message


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = connection.recv(min(size - len(data), 1 << 16))
        if not part:
            raise EOFError("the connection ended")
        data += part
    return bytes(data)


def build_id() -> str:
    """What must be equal on both sides: the program, the packages it runs with, the bundled model, the settings."""
    root = Path(__file__).parents[1]
    patterns = ("indexer/**/*.py", "blipcore/*.py", "blipcore/models/**/*.py", "blipcore/bundled/*/*")
    files = [file for pattern in patterns for file in sorted(root.glob(pattern))]
    settings = [os.environ.get(name, "") for name in MODEL_SETTINGS]
    digest = hashlib.sha256(repr([sys.executable, sys.version, settings]).encode("utf-8", "surrogateescape"))
    for file in (*files, Path(sysconfig.get_path("purelib"))):
        with suppress(OSError):
            found = file.stat()
            digest.update(f"{file}\0{found.st_size}\0{found.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


# -- where it listens ----------------------------------------------------------------------------------------


class Place:
    """The folder of the warm process, closed to others, and what leads to it there.

    Args:
        unix: a Unix domain socket; otherwise a port of localhost, known with its token by a file for the user alone.
    """

    def __init__(self, folder: Path | None = None, unix: bool = os.name == "posix"):
        self.folder, self.unix = folder or runtime_folder(), unix
        self.file = self.folder / ("serve.sock" if unix else "serve.json")
        self.token = ""

    def make(self) -> None:
        """Raises PhotoblipError where the folder cannot be made, or is another user's."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if os.name == "posix":
                if self.folder.lstat().st_uid != os.getuid():
                    raise PermissionError("it is another user's")
                self.folder.chmod(0o700)
        except OSError as error:
            raise PhotoblipError(f"{self.folder} cannot be used ({error}): set XDG_RUNTIME_DIR") from error

    def listen(self) -> socket.socket:
        """A listening socket, in place of one that a dead process left."""
        self.forget()
        if not self.unix:
            listener = socket.create_server(("127.0.0.1", 0))
            self.token = secrets.token_hex(32)
            values = {"port": listener.getsockname()[1], "token": self.token}
            with open(os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:  # noqa: PTH123
                json.dump(values, file)
            return listener
        listener = socket.socket(socket.AF_UNIX)
        try:
            listener.bind(str(self.file))
            self.file.chmod(0o600)
            listener.listen(16)
        except OSError as error:
            listener.close()
            raise PhotoblipError(f"{self.file} cannot be a socket ({error}): set XDG_RUNTIME_DIR") from error
        return listener

    def connect(self) -> socket.socket:
        """A connection to the user's own warm process. Raises NotRunning."""
        connection = None
        try:
            self._check_owner()
            if self.unix:
                connection = socket.socket(socket.AF_UNIX)
                connection.settimeout(CONNECT_SECONDS)
                connection.connect(str(self.file))
            else:
                values = json.loads(self.file.read_text())
                self.token = str(values["token"])
                connection = socket.create_connection(("127.0.0.1", int(values["port"])), CONNECT_SECONDS)
            if not is_same_user(connection):
                raise PermissionError("it is another user's")
        except (OSError, ValueError, KeyError, TypeError) as error:
            if connection is not None:
                connection.close()
            raise NotRunning(f"no warm process is running ({error})") from error
        return connection

    def _check_owner(self) -> None:
        if os.name == "posix":
            found = self.folder.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
                raise PermissionError("its folder is open to others")

    def forget(self) -> None:
        self.file.unlink(missing_ok=True)


def runtime_folder() -> Path:
    """The platform's folder for what lives as long as a user's session."""
    with warnings.catch_warnings(action="ignore"):  # an unusable XDG_RUNTIME_DIR is passed over
        return user_runtime_path("photoblip")


def is_same_user(connection: socket.socket) -> bool:
    """By the kernel's word, on systems where it gives one; elsewhere the folder's permissions decide."""
    if connection.family != getattr(socket, "AF_UNIX", None) or not hasattr(socket, "SO_PEERCRED"):
        return True
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return struct.unpack("3i", credentials)[1] == os.getuid()


# -- the asking side -----------------------------------------------------------------------------------------


def ask_server(command: str, place: Place | None = None, **values) -> dict:
    """A command's answer by the warm process; also "status" and "stop".

    Raises:
        Unanswered: there is none, or it is busy, of another build, or broken. PhotoblipError: as the command.
    """
    try:
        place = place or Place()
        with place.connect() as connection:
            message = {"command": command, "build": build_id(), "token": place.token, **values}
            connection.settimeout(TURN_SECONDS + READ_SECONDS)
            send(connection, message)
            reply = receive(connection)
            if "turn" in reply:
                connection.settimeout(ANSWER_SECONDS)
                reply = receive(connection)
    except (OSError, EOFError, ValueError) as error:
        raise Unanswered(f"the warm process broke off ({error})") from error
    if isinstance(reply.get("error"), str):
        raise PhotoblipError(reply["error"])
    if not isinstance(reply.get("answer"), dict):
        raise Unanswered(f"the warm process refused: {reply.get('refused', 'no answer')}")
    return reply["answer"]


def stop_server(place: Place | None = None, wait_seconds: float = 5.0) -> dict:
    """End the warm process, and wait until its place is free. Raises Unanswered where none runs."""
    place = place or Place()
    values = ask_server("stop", place)
    until = time.monotonic() + wait_seconds
    while place.file.exists() and time.monotonic() < until:
        time.sleep(0.05)
    return values


# -- the answering side --------------------------------------------------------------------------------------


class _Handler(socketserver.BaseRequestHandler):
    """One connection, one request."""

    def handle(self) -> None:
        self.request.settimeout(READ_SECONDS)
        with suppress(OSError, EOFError):  # the client is gone
            try:
                message = receive(self.request) if is_same_user(self.request) else {}
            except ValueError as error:
                send(self.request, {"refused": str(error)})
                return
            with closing(self.server.replies(message)) as replies:
                for reply in replies:
                    send(self.request, reply)


class WarmProcess(socketserver.ThreadingTCPServer):
    """Answers one request at a time, in one thread that owns the models, until it has been idle or is told to stop.

    Between requests it holds no file of a library open, so a library may move or go.

    Args:
        idle_seconds: how long nobody may ask. open_library: folder -> an open PhotoLibrary.
        run: (arguments, terminal) -> what the command line prints, as `printed`; None: only answers are given.

    Raises:
        PhotoblipError: another one is running, or the place cannot be used.
    """

    daemon_threads, block_on_close = True, False

    def __init__(
        self,
        place: Place | None = None,
        *,
        idle_seconds: float = 1800,
        open_library: Callable | None = None,
        run: Callable[[list[str], dict], dict] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        from filelock import FileLock, Timeout

        self.place, self.idle_seconds, self.clock = place or Place(), idle_seconds, clock
        self.place.make()
        self._alone = FileLock(self.place.folder / "serve.lock", timeout=1)
        try:
            self._alone.acquire()
        except Timeout as error:
            raise PhotoblipError("a warm process is running already: `photoblip serve --stop` ends it") from error
        super().__init__(None, _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = self.place.listen()
        self.timeout = min(0.5, idle_seconds / 4)  # between two looks at the clock
        self.build, self.stopping, self.requests = build_id(), False, 0
        self._open, self._run = open_library or _open_library, run
        self._libraries: dict[Path, tuple] = {}
        self._turn, self._worker = threading.Lock(), ThreadPoolExecutor(1)
        self._started = self._used = clock()

    def run(self) -> None:
        """Serve until idle or stopped; then nothing is left behind."""
        try:
            while not self.stopping and not self.is_idle():
                self.handle_request()
        finally:
            self.close()

    def is_idle(self) -> bool:
        return not self._turn.locked() and self.clock() - self._used >= self.idle_seconds

    def close(self) -> None:
        self.place.forget()
        self.server_close()
        self._alone.release()
        self._worker.shutdown(wait=False, cancel_futures=True)

    def warm(self, folder: Path) -> None:
        """Begin to load a library's model and index, where there is a library."""
        if LibraryPaths(folder).catalog.exists():
            self._worker.submit(self._warm, folder)

    def _warm(self, folder: Path) -> None:
        photos = self._library(folder)
        photos.searcher().encoder.embed_texts(["a photo"])
        photos.close()

    def replies(self, message: dict) -> Iterator[dict]:
        """What a request gets, in order: a refusal, or the turn and then the answer."""
        command = message.get("command")
        if not secrets.compare_digest(str(message.get("token")).encode(), self.place.token.encode()):
            yield {"refused": "it does not know this user"}
        elif command == "status":
            yield {"answer": self.status(message.get("build"))}
        elif command == "stop":
            try:
                yield {"answer": {"stopped": os.getpid()}}
            finally:
                self.stopping = True
        elif message.get("build") != self.build:
            yield {"refused": "it is of another build"}
            self.stopping = build_id() != self.build  # the program was replaced under it: make room for its successor
        elif command == "print" and self._run is None:
            yield {"answer": {}}
        elif command not in {*COMMANDS, "print"}:
            yield {"refused": f"it has no command {command!r}"}
        else:
            yield from self._in_turn(command, message)

    def _in_turn(self, command: str, message: dict) -> Iterator[dict]:
        if not self._turn.acquire(timeout=TURN_SECONDS):
            yield {"refused": "it is busy"}
            return
        try:
            yield {"turn": True}
            answered = self._worker.submit(self._work, command, message).result()
        finally:
            self._used = self.clock()
            self.requests += 1
            self._turn.release()
        yield answered

    def _work(self, command: str, message: dict) -> dict:
        try:
            if command == "print":
                return {"answer": self._print(message)}
            return {"answer": self.answer(Path(message["library"]), command, message["options"])}
        except (PhotoblipError, ModelError) as error:
            return {"error": str(error)}
        except Exception as error:  # the command meets it too, and shows it to its user
            return {"refused": f"it failed ({error!r})"}

    def answer(self, folder: Path, command: str, options: dict) -> dict:
        """One of COMMANDS over a library."""
        photos = self._library(folder)
        try:
            return COMMANDS[command](photos, **options)
        finally:
            photos.close()  # it opens again when asked

    def _print(self, message: dict) -> dict:
        """What a whole command line prints; nothing where its own process has to run it."""
        answering = _answering.set(self)
        try:
            with chdir(message["folder"]):  # its paths are meant from there; this thread alone has relative ones
                whole = self._run(message["arguments"], message["terminal"])
        except Unanswered:
            return {}
        finally:
            _answering.reset(answering)
        return {} if whole["status"] == USAGE else whole

    def _library(self, folder: Path):
        """An open library, the last MAX_LIBRARIES of them kept; opened anew where its catalog is another file."""
        identity = _identity(LibraryPaths(folder).catalog)
        known, photos = self._libraries.pop(folder, (None, None))
        if known is None or known != identity:
            photos = self._open(folder)
        self._libraries[folder] = (identity, photos)
        while len(self._libraries) > MAX_LIBRARIES:
            del self._libraries[next(iter(self._libraries))]
        return photos

    def status(self, build: str | None) -> dict:
        """What it is and holds, for people."""
        now = self.clock()
        return {
            "pid": os.getpid(),
            "same_build": build == self.build,
            "up_seconds": round(now - self._started),
            "ends_in_seconds": round(self._used + self.idle_seconds - now),
            "requests": self.requests,
            "libraries": [str(folder) for folder in list(self._libraries)],
        }

    def handle_error(self, request, client_address) -> None:
        """Silence: the client falls back to its own work."""


def _identity(file: Path) -> tuple[int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _open_library(folder: Path):
    from indexer import PhotoLibrary

    return PhotoLibrary.open(folder, create=False)

"""The warm process answers as the command does by itself, its own user alone, and never stands in the way."""

import json
import os
import re
import socket
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from indexer import cli, serve
from indexer.cli import main
from indexer.cli.commands import run_for
from indexer.errors import PhotoblipError
from indexer.library import PhotoLibrary
from tests.fakes import ColourEncoder
from tests.indexer.conftest import COLOURS, paint

unix_only = pytest.mark.skipif(os.name != "posix", reason="Unix domain sockets and file modes")


@pytest.fixture
def place(tmp_path_factory, monkeypatch):
    """A runtime folder of the test's own; the command line under test uses it too."""
    folder = tmp_path_factory.mktemp("run") / "photoblip"
    monkeypatch.setattr(serve, "runtime_folder", lambda: folder)
    build = serve.build_id()
    monkeypatch.setattr(serve, "build_id", lambda: build)  # whoever edits a source meanwhile
    monkeypatch.delenv("PHOTOBLIP_SERVE", raising=False)
    return serve.Place()


class Opened:
    """Opens libraries with the fake encoder, and counts."""

    def __init__(self):
        self.folders, self.photos = [], []

    def __call__(self, folder):
        self.folders.append(folder)
        self.photos.append(PhotoLibrary.open(folder, create=False, load_encoder=lambda name: ColourEncoder()))
        return self.photos[-1]


@pytest.fixture
def start(place):
    """Starts a warm process in a thread of this one. -> (process, thread)."""
    started = []

    def start_it(place=place, **options):
        process = serve.WarmProcess(place, open_library=options.pop("open_library", Opened()), **options)
        process.timeout = 0.02
        thread = threading.Thread(target=process.run, daemon=True)
        thread.start()
        started.append((process, thread))
        return process, thread

    yield start_it
    for process, thread in started:
        process.stopping = True
        thread.join(5)


class Leaving:
    """A pipe whose reader is gone."""

    def write(self, text):
        raise BrokenPipeError

    def fileno(self):
        return 1


@pytest.fixture
def photoblip(library, place, monkeypatch, capsys):
    """Runs the command over the test's library. `opened` are the libraries that the command opened by itself."""
    monkeypatch.setenv("PHOTOBLIP_LIBRARY", str(library.paths.folder))
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr("indexer.library._load_encoder", lambda name, cold: ColourEncoder())
    monkeypatch.setattr("signal.signal", lambda *_: None)
    opened, original = [], PhotoLibrary.open.__func__

    def open_counted(cls, *arguments, **options):
        if "load_encoder" not in options:
            opened.append(arguments)
        return original(cls, *arguments, **options)

    monkeypatch.setattr(PhotoLibrary, "open", classmethod(open_counted))

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["photoblip", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        return stopped.value.code or 0, *capsys.readouterr()

    run.opened = opened
    return run


def ask(library, place, **options):
    values = {"library": str(library.paths.folder), "options": {"text": "red", **options}}
    return serve.ask_server("search", place, **values)


def without_seconds(answered):
    code, stdout, stderr = answered
    return code, stdout, stderr.rsplit(" in ", 1)[0]


@pytest.mark.parametrize("whole", [False, True], ids=["answers", "whole command lines"])
def test_every_command_prints_what_it_prints_alone(photoblip, photos, start, tmp_path, monkeypatch, whole):
    (tmp_path / "lines").write_text("red\nblue\n")
    monkeypatch.chdir(photos)  # the warm process is elsewhere: relative paths must arrive whole
    commands = [
        ("search", "red", "--json"),
        ("search", "red", "--top", 2),
        ("search", "red", "--without", "blue", "--where", "name=red*"),
        ("search", "--image", "blue.png", "--json"),
        ("search", "red", "--min-probability", 1),
        ("similar", "red.png", "--json"),
        ("similar", 1),
        ("describe", "red.png", "--candidates", tmp_path / "lines"),
        ("search", "red", "--where", "year="),
        ("similar", "gone.png"),
        ("search", "--image", "gone.png"),
        ("describe", "red.png"),
        ("ask", "red.png", "what is it?"),
    ]
    alone = [without_seconds(photoblip(*command)) for command in commands]
    assert len(photoblip.opened) == len(commands) and any(code for code, *_ in alone)
    photoblip.opened.clear()
    monkeypatch.setattr(serve, "TURN_SECONDS", 60)
    process, _ = start(run=run_for if whole else None)
    assert [without_seconds(photoblip(*command)) for command in commands] == alone
    assert (photoblip.opened, process.requests) == ([], len(commands))


def test_serve_never_leaves_it_alone(photoblip, start, monkeypatch):
    process, _ = start()
    monkeypatch.setenv("PHOTOBLIP_SERVE", "never")
    assert photoblip("search", "red")[0] == 0
    assert (len(photoblip.opened), process.requests) == (1, 0)


def test_auto_starts_one_for_the_next_command(photoblip, place, start, monkeypatch):
    begun = []
    monkeypatch.setattr(serve.subprocess, "Popen", lambda command, **options: begun.append(command))
    assert photoblip("search", "red")[0] == 0 and begun == []
    monkeypatch.setenv("PHOTOBLIP_SERVE", "auto")
    assert photoblip("search", "red")[0] == 0
    assert begun[0][1:4] == ["-m", "indexer.cli", "serve"] and len(begun) == 1
    start()
    photoblip("search", "red")
    assert len(begun) == 1


def play(place, *answers):
    """A server that sends these bytes to its one client, whatever it asks."""
    place.make()
    listener = place.listen()

    def run():
        connection, _ = listener.accept()
        with connection, listener:
            serve.receive(connection)
            for answer in answers:
                connection.sendall(answer)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def packed(value):
    data = json.dumps(value).encode()
    return serve.HEADER.pack(len(data)) + data


@pytest.mark.parametrize(
    ("answers", "why"),
    [
        ([], "broke off"),
        ([packed({"turn": True})], "broke off"),
        ([packed({"turn": True}), packed({"answer": {}})[:-1]], "broke off"),
        ([b"HTTP/1.1 400 Bad Request\r\n\r\n"], "too large"),
        ([serve.HEADER.pack(4) + b"\xff{]!"], "broke off"),
        ([packed([1, 2])], "not an object"),
        ([packed({"answer": "red"})], "no answer"),
        ([packed({"refused": "it is busy"})], "busy"),
    ],
)
def test_a_broken_answer_leaves_the_work_to_the_command(photoblip, place, answers, why):
    thread = play(place, *answers)
    code, stdout, stderr = photoblip("search", "red", "--json", "--verbose")
    thread.join(5)
    assert code == 0 and len(stdout.splitlines()) == 4 and len(photoblip.opened) == 1
    assert why in stderr


def test_the_fallback_is_silent(photoblip, place):
    play(place)
    assert photoblip("search", "red", "--json")[2] == ""


def test_another_build_is_refused_and_makes_room(photoblip, start, monkeypatch, place):
    process, thread = start()
    builds = iter(["another client's"])
    monkeypatch.setattr(serve, "build_id", lambda: next(builds, process.build))
    code, _, stderr = photoblip("search", "red", "--verbose")
    assert code == 0 and len(photoblip.opened) == 1 and "another build" in stderr
    assert thread.is_alive()  # its own program is as it was: the client is from elsewhere
    monkeypatch.setattr(serve, "build_id", lambda: "a new program")
    assert photoblip("search", "red")[0] == 0
    thread.join(5)
    assert not thread.is_alive() and not place.file.exists()


def test_a_build_is_known_by_its_sources_and_settings(monkeypatch, tmp_path):
    for name in ("indexer/serve.py", "blipcore/models/blip.py"):
        file = tmp_path / name
        file.parent.mkdir(parents=True)
        file.write_text("one")
    monkeypatch.setattr(serve, "__file__", str(tmp_path / "indexer" / "serve.py"))
    first = serve.build_id()
    assert serve.build_id() == first
    (tmp_path / "blipcore/models/blip.py").write_text("three")
    second = serve.build_id()
    monkeypatch.setenv("PHOTOBLIP_MODELS", "/elsewhere")
    assert len({first, second, serve.build_id()}) == 3


class Slow(ColourEncoder):
    """Embeds texts when told to."""

    def __init__(self):
        super().__init__()
        self.asked, self.go_on = threading.Event(), threading.Event()

    def embed_texts(self, texts):
        self.asked.set()
        assert self.go_on.wait(10)
        return super().embed_texts(texts)


def slow_process(start):
    encoder = Slow()
    process, _ = start(
        open_library=lambda folder: PhotoLibrary.open(folder, create=False, load_encoder=lambda name: encoder)
    )
    return process, encoder


def test_two_clients_are_served_one_after_the_other(library, place, start):
    process, encoder = slow_process(start)
    with ThreadPoolExecutor(2) as clients:
        asked = [clients.submit(ask, library, place, text=text) for text in ("red", "blue")]
        assert encoder.asked.wait(5)
        encoder.go_on.set()
        first = [Path(future.result(10)["rows"][0]["path"]).name for future in asked]
    assert first == ["red.png", "blue.png"] and process.requests == 2


def test_a_busy_process_refuses_in_time(library, place, start, monkeypatch):
    monkeypatch.setattr(serve, "TURN_SECONDS", 0.05)
    _, encoder = slow_process(start)
    with ThreadPoolExecutor(1) as clients:
        first = clients.submit(ask, library, place)
        assert encoder.asked.wait(5)
        with pytest.raises(serve.Unanswered, match="busy"):
            ask(library, place)
        encoder.go_on.set()
        assert len(first.result(10)["rows"]) == 4


def test_a_client_that_goes_away_leaves_it_free(library, place, start):
    process, encoder = slow_process(start)
    connection = place.connect()
    message = {"command": "search", "build": process.build, "token": "", "library": str(library.paths.folder)}
    serve.send(connection, message | {"options": {"text": "red"}})
    assert encoder.asked.wait(5)
    connection.close()
    encoder.go_on.set()
    assert len(ask(library, place)["rows"]) == 4


@unix_only
def test_only_the_user_gets_in(place, start):
    start()
    assert stat.S_IMODE(place.folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(place.file.stat().st_mode) == 0o600
    assert serve.ask_server("status")["pid"] == os.getpid()
    place.folder.chmod(0o755)
    with pytest.raises(serve.NotRunning, match="open to others"):
        serve.ask_server("status")


@unix_only
def test_another_users_connection_is_refused_on_both_sides(library, place, start, monkeypatch):
    process, _ = start()
    monkeypatch.setattr(serve, "is_same_user", lambda connection: False)
    with pytest.raises(serve.NotRunning, match="another user"):
        ask(library, place)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(place.file))
        connection.settimeout(5)
        with suppress(OSError):  # it may hang up before all is sent
            serve.send(connection, {"command": "stop", "token": ""})
            assert connection.recv(1) in {b"", b"\0"}
    assert not process.stopping


@pytest.mark.skipif(not hasattr(socket, "SO_PEERCRED"), reason="Linux tells who is connected")
def test_the_kernel_says_who_is_connected(monkeypatch):
    ours, _ = pair = socket.socketpair(socket.AF_UNIX)
    assert serve.is_same_user(ours)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert not serve.is_same_user(ours)
    for end in pair:
        end.close()


def test_localhost_needs_the_token(library, place, start):
    tcp = serve.Place(place.folder, unix=False)
    process, thread = start(tcp)
    assert stat.S_IMODE(tcp.file.stat().st_mode) == 0o600 or os.name != "posix"
    assert len(ask(library, serve.Place(place.folder, unix=False))["rows"]) == 4
    port = json.loads(tcp.file.read_text())["port"]
    tcp.file.unlink()
    tcp.file.write_text(json.dumps({"port": port, "token": "guessed"}))
    with pytest.raises(serve.Unanswered, match="does not know"):
        ask(library, serve.Place(place.folder, unix=False))
    with pytest.raises(serve.Unanswered):
        serve.ask_server("stop", serve.Place(place.folder, unix=False))
    assert thread.is_alive() and not process.stopping


def test_it_goes_when_nobody_asks(library, place, start):
    now = [0.0]
    _, thread = start(idle_seconds=60, clock=lambda: now[0])
    now[0] = 59
    assert len(ask(library, place)["rows"]) == 4
    now[0] = 118
    assert serve.ask_server("status", place)["ends_in_seconds"] == 1  # the search counted, and this does not
    now[0] = 120
    thread.join(5)
    assert not thread.is_alive() and not place.file.exists()


def test_there_is_one_and_it_stops_when_told(photoblip, place, start):
    _, thread = start()
    with pytest.raises(PhotoblipError, match="running already"):
        serve.WarmProcess(place)
    code, stdout, _ = photoblip("serve", "--status", "--json")
    status = json.loads(stdout)
    assert code == 0 and status["same_build"] and status["libraries"] == []
    assert photoblip("serve", "--stop")[0] == 0
    thread.join(5)
    assert not thread.is_alive()
    assert photoblip("serve", "--status")[0] == 1
    code, _, stderr = photoblip("serve", "--stop")
    assert code == 0 and "no warm process" in stderr


@unix_only
def test_a_socket_left_by_the_dead_is_replaced(library, place, start):
    place.make()
    place.listen().close()
    assert place.file.exists()
    with pytest.raises(serve.NotRunning):
        ask(library, place)
    start()
    assert len(ask(library, place)["rows"]) == 4


def test_a_message_over_the_limit_is_refused(library, place, start, monkeypatch):
    process, _ = start()
    with place.connect() as connection:
        connection.settimeout(5)
        connection.sendall(serve.HEADER.pack(serve.MAX_MESSAGE + 1))
        assert serve.receive(connection) == {"refused": "the message is too large"}
    monkeypatch.setattr(serve, "MAX_MESSAGE", 1000)
    with pytest.raises(serve.Unanswered, match="too large"):
        ask(library, place, text="red " * 1000)
    assert process.requests == 0


def test_it_sees_what_the_disk_holds_now(photoblip, photos, library, place, start, tmp_path):
    opened = Opened()
    start(open_library=opened)
    assert len(ask(library, place)["rows"]) == 4
    paint(tmp_path / "photos" / "white.png", (250, 250, 250))
    library.index(photos, workers=0)
    assert len(ask(library, place)["rows"]) == 5 and len(opened.folders) == 1
    library.close()
    folder = library.paths.folder
    folder.rename(folder.with_name("moved"))
    with pytest.raises(PhotoblipError, match="no library"):
        ask(library, place)
    code, _, stderr = photoblip("search", "red")
    assert code == 1 and "there is no library" in stderr
    paint(tmp_path / "few" / "red.png", COLOURS["red"])
    with PhotoLibrary.open(folder, load_encoder=lambda name: ColourEncoder()) as other:
        other.index(tmp_path / "few", workers=0)
    assert len(ask(library, place)["rows"]) == 1


def test_few_libraries_are_kept(open_library, photos, place, start):
    start()
    for number in range(serve.MAX_LIBRARIES + 1):
        library = open_library(f"library{number}")
        library.index(photos, workers=0)
        ask(library, place)
    kept = serve.ask_server("status", place)["libraries"]
    assert [Path(folder).name for folder in kept] == ["library1", "library2", "library3"]


def test_a_failure_inside_is_left_to_the_command(library, place, start):
    class Broken(ColourEncoder):
        def embed_texts(self, texts):
            raise RuntimeError("out of memory")

    start(open_library=lambda folder: PhotoLibrary.open(folder, load_encoder=lambda name: Broken()))
    with pytest.raises(serve.Unanswered, match="out of memory"):
        ask(library, place)


def test_asking_loads_nothing_heavy(tmp_path):
    heavy = ("torch", "numpy", "sqlalchemy", "PIL", "filelock", "typer", "rich", "pydantic")
    program = "import sys, indexer.cli\nfrom indexer.serve import printed\nassert printed(['search', 'red']) is None\n"
    program += f"print([m for m in {heavy} if m in sys.modules])"
    environment = os.environ | {"XDG_RUNTIME_DIR": str(tmp_path), "PHOTOBLIP_SERVE": ""}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "[]"


# -- whole command lines --------------------------------------------------------------------------------------


def at_a_terminal(monkeypatch, **environment):
    """From here on somebody watches stdout and stderr."""
    for name in serve.TERMINAL_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True)


def test_a_whole_command_line_is_printed_as_its_own_terminal_shows_it(photoblip, start, monkeypatch):
    start(run=run_for)
    plain = photoblip("search", "red", "--top", 2)
    at_a_terminal(monkeypatch, TERM="xterm-256color", COLUMNS="40")
    coloured = photoblip("search", "red", "--top", 2)
    assert "\x1b[1m" in coloured[1] and "\x1b" not in plain[1]
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured[1]) == plain[1]
    monkeypatch.setenv("TERM", "dumb")
    assert photoblip("search", "red", "--top", 2)[1] == plain[1]
    assert photoblip.opened == []


def test_wrong_usage_is_said_by_the_command_itself(photoblip, start):
    process, _ = start(run=run_for)
    for arguments in (("search",), ("search", "red", "--top", "many"), ("ask", "red.png")):
        code, stdout, stderr = photoblip(*arguments)
        assert (code, stdout) == (2, "") and "Usage: " in stderr
    assert photoblip("search", "--help")[0] == 0 and process.requests == 3


def test_another_library_than_the_users_own_is_named_in_the_command_line(photoblip, start, open_library, photos):
    start(run=run_for)
    with open_library("other") as other:
        other.index(photos / "red.png", workers=0)
    code, stdout, _ = photoblip("search", "red", "--json", "--library", other.paths.folder)
    assert code == 0 and len(stdout.splitlines()) == 1 and photoblip.opened == []


def test_a_reader_that_leaves_ends_the_printing(monkeypatch):
    monkeypatch.setattr("indexer.cli.os.dup2", lambda *_: None)
    monkeypatch.setattr(sys, "stdout", Leaving())
    assert cli._show({"status": 0, "pieces": [["stdout", "red\n"]]}) == 1

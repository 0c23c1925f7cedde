"""The runs of ``make gpu`` on parts that fail, hang, crash and write garbage: the others run."""

import importlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

runner = importlib.import_module("device.runner")
runs = importlib.import_module("device.runs")
gpu = importlib.import_module("gpu")
Job, Part = runner.Job, runner.Part

HERE = {"gpu": None, "arch": None}
# as a kernel that does not come back: no signal but SIGKILL ends it
DEAF = "trap '' TERM; echo deaf; while :; do sleep 1; done"


def python(name, code, **fields):
    return Job(name, [sys.executable, "-u", "-c", code], **fields)


def shell(name, code, **fields):
    return Job(name, ["sh", "-c", code], **fields)


def good(name="good"):
    return Part(name, 30.0, (python(name, f"print('{name} ran')"),))


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "GRACE", 0.2)
    return runner.Run("smoke", tmp_path / "out", tmp_path / "work", {"machine": HERE})


def summary(run):
    return json.loads((run.out / f"{run.name}-summary.json").read_text())


def statuses(run):
    return {job["job"]: job["status"] for job in summary(run)["jobs"]}


def lives(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()


PLANTED = {
    "a build that fails": ("echo nvcc: no such architecture; exit 2", "exit status 2"),
    "a kernel that hangs": (DEAF, "out of time after 2 s"),
    "a test that crashes": ("kill -SEGV $$", "ended by SIGSEGV"),
    "a wrong result": ("echo RuntimeError: y differs >&2; exit 1", "exit status 1"),
}  # fmt: skip


def test_planted_failures_leave_the_rest_running(run):
    jobs = tuple(shell(name, code, limit=2.0) for name, (code, _) in PLANTED.items())
    absent = Job("absent", ["/no/such/program"])
    passed = run.run([good("first"), Part("planted", 30.0, (*jobs, absent)), good("last")], 90.0,
                     dict(os.environ))  # fmt: skip
    found = statuses(run)
    assert not passed and not summary(run)["passed"]
    assert found["first"] == found["last"] == "passed"
    assert {name: found[name] for name in PLANTED} == {n: s for n, (_, s) in PLANTED.items()}
    assert found["absent"].startswith("not begun: ")
    words = {job["job"]: job["output"] for job in summary(run)["jobs"]}
    assert "no such architecture" in words["a build that fails"]
    assert "y differs" in words["a wrong result"] and "deaf" in words["a kernel that hangs"]
    assert words["last"] == ""
    text = (run.out / "smoke-summary.txt").read_text()
    assert "7 jobs, 5 of them failed" in text and "ended by SIGSEGV" in text
    with tarfile.open(run.out / "smoke.tar.gz") as archive:
        log = archive.extractfile("logs/planted-a build that fails.log").read()
    assert b"no such architecture" in log
    assert len(list(run.out.iterdir())) <= 8


def test_all_that_pass(run):
    assert run.run([good("a"), good("b")], 60.0, dict(os.environ))
    assert summary(run)["passed"] and set(statuses(run).values()) == {"passed"}


@pytest.mark.parametrize("hangs", [False, True])
def test_no_process_is_left(run, hangs):
    code = "sleep 600 & echo $!; " + ("wait" if hangs else "")
    run.run([Part("leaves", 2.0, (shell("leaves", code),))], 2.0, dict(os.environ))
    pid = int((run.logs / "leaves-leaves.log").read_text().split()[0])
    end = time.monotonic() + 20
    while lives(pid) and time.monotonic() < end:
        time.sleep(0.01)
    assert not lives(pid)


def test_a_second_session_does_not_hold_the_run(run):
    """A process that left the group keeps the pipe open."""
    code = "import subprocess; p = subprocess.Popen(['sleep', '600'], start_new_session=True); "
    code += "print(p.pid)"
    run.run([Part("leaves", 60.0, (python("leaves", code),)), good()], 90.0, dict(os.environ))
    assert set(statuses(run).values()) == {"passed"}
    pid = int((run.logs / "leaves-leaves.log").read_text())
    assert lives(pid)
    os.kill(pid, signal.SIGKILL)


def test_garbage(run):
    """Bytes that are no text and endless output fit a log; rows that cannot be read fail."""
    rows = run.rows / "cpu-x"
    rows.mkdir()
    (rows / "good.json").write_text("[{}]")
    noise = "import os; [os.write(1, bytes(range(256)) * 400) for _ in range(40)]"
    garbage = f"open({str(rows / 'ops.json')!r}, 'wb').write(b'[\\xff')"
    other = f"open({str(rows / 'nets.json')!r}, 'w').write('[1]')"
    run.run(
        [Part("noise", 30.0, (python("noise", noise),)),
         Part("garbage", 30.0, (python("garbage", garbage),)),
         Part("other", 30.0, (python("other", other),)), good()], 120.0, dict(os.environ),
    )  # fmt: skip
    assert statuses(run) == {
        "noise": "passed", "good": "passed",
        "garbage": "wrote rows that cannot be read: ops.json",
        "other": "wrote rows that cannot be read: nets.json",
    }  # fmt: skip
    assert {path.name for path in rows.glob("*.json")} == {"good.json"}
    log = run.logs / "noise-noise.log"
    assert log.stat().st_size < runner.HEAD + runner.TAIL + 100
    assert b"4096000 bytes in all" in log.read_bytes()
    assert sum(path.stat().st_size for path in run.out.iterdir()) < 2**20


def test_rows_come_back_as_they_are_written(run):
    """A part that is killed leaves what it had, and the archive has it after each part."""
    path = run.rows / "cpu-x" / "ops.json"
    path.parent.mkdir()
    code = f"""printf '[{{"a": 1}}]' > '{path}'; sleep 600"""
    run.run([Part("ops", 2.0, (shell("ops", code),))], 2.0, dict(os.environ))
    with tarfile.open(run.out / "smoke.tar.gz") as archive:
        assert archive.extractfile("rows/cpu-x/ops.json").read() == b'[{"a": 1}]'


def test_limits_shrink_with_the_seconds():
    todo = [Part("a", 10.0, ()), Part("b", 30.0, ())]
    assert runner.limit_of(todo, 100.0) == 10.0
    assert runner.limit_of(todo, 20.0) == 5.0
    assert runner.limit_of(todo[1:], 15.0) == 15.0  # b's share of what a left
    assert runner.limit_of(todo, -1.0) == 0.0


def test_a_command_is_told_its_seconds_and_what_has_none_left_does_not_begin(run):
    told = Job("told", [sys.executable, "-c", "import sys; print(sys.argv[1])", runner.SECONDS])
    run.run([Part("told", 100.0, (told,)), Part("none", 1e6, (good().jobs[0],))], 101.0,
            dict(os.environ))  # fmt: skip
    limit = summary(run)["jobs"][0]["limit"]
    assert limit < 1
    assert set(statuses(run).values()) == {"not begun: no time was left", "passed"}
    run.results.clear()
    run.run([Part("told", 100.0, (told,))], 50.0, dict(os.environ))
    assert (run.logs / "told-told.log").read_text() == "42\n"  # 50, less the margin


def test_the_limit_of_a_part_ends_its_jobs(run):
    jobs = tuple(shell(f"hangs {i}", "sleep 600", limit=300.0) for i in range(2))
    run.run([Part("kernels", 2.0, jobs)], 60.0, dict(os.environ))
    assert [*statuses(run).values()] == ["out of time after 2 s", "not begun: no time was left"]


def test_jobs_at_a_time(run, tmp_path):
    """Each waits for the other: one after the other they would not end."""
    code = """if True:
        import pathlib, sys, time
        mine, other = map(pathlib.Path, sys.argv[1:])
        mine.touch()
        while not other.exists():
            time.sleep(0.01)
    """
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    jobs = [Job(n, [sys.executable, "-c", code, *w]) for n, w in (("a", (a, b)), ("b", (b, a)))]
    assert run.run([Part("both", 30.0, tuple(jobs), at_once=2)], 30.0, dict(os.environ))


def test_a_run_that_is_ended_ends_its_processes(tmp_path):
    code = f"""if True:
        import os, sys
        from pathlib import Path
        sys.path.insert(0, {str(gpu.ROOT / "benchmarks")!r})
        from device.runner import Job, Part, Run, killing
        run = Run("gpu", Path({str(tmp_path / "out")!r}), Path({str(tmp_path / "work")!r}), {{}})
        with killing():
            run.run([Part("a", 600.0, (Job("a", ["sh", "-c", "echo $$; sleep 600"]),))], 600.0,
                    dict(os.environ))
    """
    process = subprocess.Popen([sys.executable, "-c", code])
    log, end = tmp_path / "work" / "logs" / "a-a.log", time.monotonic() + 30
    while not (log.exists() and log.read_text().endswith("\n")) and time.monotonic() < end:
        time.sleep(0.01)
    child = int(log.read_text())
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM
    while lives(child) and time.monotonic() < end:
        time.sleep(0.01)
    assert not lives(child)


# --- the parts that are run


@pytest.mark.parametrize("dry", [False, True])
def test_the_parts_of_both_runs(tmp_path, dry):
    made = runs.Runs(tmp_path, dry, "9.0a")
    first, second = made.smoke(), made.full(runs.CASES)
    assert sum(part.limit for part in first) <= runs.SMOKE_SECONDS == 270
    assert sum(part.limit for part in second) <= runs.FULL_SECONDS == 420
    for part in [*first, *second, made.build(), *map(made.named, runs.NAMED)]:
        assert part.jobs
        for job in part.jobs:
            assert all(isinstance(word, str) for word in job.command)
            scripts = [word for word in job.command[1:2] if word.endswith(".py")]
            assert all(Path(word).is_file() for word in scripts), job
    assert made.named("peaks") == next(part for part in first if part.name == "peaks")
    with pytest.raises(KeyError):
        made.named("nosuch")


def test_every_suite_is_a_part(tmp_path):
    suites = importlib.import_module("suites").SUITES
    run = {name for name, suite in suites.items() if suite.workloads or suite.rows}
    made = runs.Runs(tmp_path, True)
    named = {part.name for part in made.smoke()} | set(runs.NAMED)
    assert run <= named | {"inference"}


def test_the_cases_are_those_of_smoke():
    assert tuple(importlib.import_module("device.smoke").CASES) == runs.CASES


def test_what_failed_is_tried_again(tmp_path):
    path = tmp_path / "smoke-summary.json"
    assert runs.failed_cases(path) == ()
    path.write_text("garbage")
    assert runs.failed_cases(path) == ()
    jobs = [{"job": name, "status": "passed"} for name in runs.CASES]
    jobs[1]["status"] = jobs[5]["status"] = "ended by SIGSEGV"
    path.write_text(json.dumps({"jobs": [*jobs, {"job": "peaks", "status": "exit status 1"}]}))
    failed = runs.failed_cases(path)
    assert failed == (runs.CASES[1], runs.CASES[5])
    again, *_ = runs.Runs(tmp_path, False).full(failed)
    assert [job.name for job in again.jobs] == [*failed]
    assert again.limit == 20 and {job.limit for job in again.jobs} == {15.0}


# --- the command


@pytest.mark.parametrize("options", [["nosuch"], ["smoke", "peaks"]])
def test_make_gpu_refuses(options, capsys):
    with pytest.raises(SystemExit):
        gpu.main(options)


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "benchmarks/README.md"])
def test_the_commands_of_the_pages_are_understood(page):
    text = (gpu.ROOT / page).read_text()
    lines = [line.partition("#")[0].split() for line in text.splitlines()]
    makes = [words[1:] for words in lines if words[:1] == ["make"] and "gpu" in " ".join(words)]
    assert makes
    for words in makes:
        done = subprocess.run(["make", "-n", *words], cwd=gpu.ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        for command in done.stdout.splitlines():
            if "benchmarks/gpu.py" in command:
                gpu.parse(command.split("benchmarks/gpu.py")[1].split())
    for word in words_of(text):
        gpu.parse([word])


def words_of(text):
    """The parts that a page names."""
    names = text.partition("neither run too: ")[2].partition(".")[0]
    return names.replace("`", "").replace("\n", " ").replace(",", " ").split()


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """``gpu.main`` with two fake parts, on a machine of which facts are given."""
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "facts_here", lambda: dict(HERE))

    def main(*options, second="print(1)", here=HERE, taken=None):
        monkeypatch.setattr(gpu, "facts_here", lambda: dict(here))
        reasons = taken or {"libraries": None, "triton": None}
        monkeypatch.setattr(gpu.prepared, "take", lambda *args: reasons)
        todo = [good("a"), Part("b", 30.0, (python("b", second),))]
        monkeypatch.setattr(gpu.Runs, "smoke", lambda self: list(todo))
        monkeypatch.setattr(gpu.Runs, "build", lambda self: Part(
            "build", 30.0, (python("build", "raise SystemExit(1)"),)))  # fmt: skip
        return gpu.main(["smoke", "--out", str(tmp_path / "out"), *options])

    return main


def test_the_code_that_is_returned(fake, tmp_path, capsys):
    assert fake() == 0
    assert "a dry run" in capsys.readouterr().out
    assert fake(second="raise SystemExit(3)") == 1
    assert "2 jobs, 1 of them failed" in capsys.readouterr().out
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_on_a_gpu_what_is_not_prepared_is_built_and_may_fail(fake, tmp_path, capsys):
    here = {"gpu": "NVIDIA X", "arch": "9.0a"}
    assert fake(here=here) == 0  # as prepared: nothing is built
    assert "libraries: as prepared" in capsys.readouterr().out
    taken = {"libraries": "torch 2.11.0 was prepared, 2.12.0 is here", "triton": None}
    assert fake(here=here, taken=taken) == 1
    assert "built here: torch 2.11.0 was prepared" in capsys.readouterr().out
    jobs = json.loads((tmp_path / "out" / "smoke-summary.json").read_text())["jobs"]
    found = [(job["job"], job["status"]) for job in jobs]
    assert found == [("build", "exit status 1"), ("a", "passed"), ("b", "passed")]


def test_a_machine_that_says_nothing_is_a_failure(fake, capsys):
    assert fake(here={"gpu": None, "failed": "no torch"}) == 1


def test_facts_of_a_torch_that_fails_or_hangs(tmp_path, monkeypatch):
    for code, words in (("raise OSError('driver')", "driver"), ("print('nonsense')", "Expecting")):
        script = tmp_path / "facts.py"
        script.write_text(code)
        monkeypatch.setattr(gpu.prepared, "__file__", str(script))
        found = gpu.facts_here()
        assert found["gpu"] is None and words in found["failed"]

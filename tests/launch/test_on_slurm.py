"""Jobs on a real Slurm cluster: three nodes in namespaces of this machine, started by tests/slurm-lab."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cluster import LAB, LIMIT_S, ROOT, Cluster
from supervised import TRAINER, Recorded

from launch.events import read_launch_events
from launch.job import load_job, resolve_job
from launch.submit import render

pytestmark = pytest.mark.slurm
LAUNCH = [sys.executable, "-m", "launch"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Its nodes share nothing of /tmp but the folders of these tests and the code."""
    shared = [word for path in (tmp_path_factory.getbasetemp(), ROOT) for word in ("--keep", str(path))]
    folder = tmp_path_factory.mktemp("slurm")
    with Cluster.up(folder, 3, "--gpus", "2", "--mem", "8000", "--private-tmp", *shared) as cluster:
        yield cluster


def test_every_rank_knows_its_place_and_meets_the_others(cluster, tmp_path):
    job = cluster.submit(tmp_path, "meet", "met.json", environment={"NCCL_PROBE": "a b"}, spare_nodes=1)
    assert Path(job.script).read_text() == render(resolve_job(load_job(job.file, [])))
    job.wait_for_end("COMPLETED", "FAILED")
    met = json.loads((tmp_path / "met.json").read_text())
    assert [rank["RANK"] for rank in met] == ["0", "1", "2", "3"]
    assert [rank["LOCAL_RANK"] for rank in met] == ["0", "1", "0", "1"]
    assert [rank["NODE_RANK"] for rank in met] == ["0", "0", "1", "1"]
    assert [rank["SLURMD_NODENAME"] for rank in met] == ["node1", "node1", "node2", "node2"]
    assert {(rank["WORLD_SIZE"], rank["LOCAL_WORLD_SIZE"], rank["NCCL_PROBE"]) for rank in met} == {("4", "2", "a b")}
    assert len({rank["MASTER_PORT"] for rank in met}) == 1
    assert {rank["CUDA_VISIBLE_DEVICES"] for rank in met} == {"0,1"}, "each rank sees all GPUs of its node"
    assert job.facts() == ("COMPLETED", "0:0", 0), job.story()
    shown = cluster.run(*LAUNCH, "status", tmp_path / "run")
    assert re.search(r"^state +ended$", shown, re.MULTILINE) and f"job        {job.id} completed" in shown, shown
    assert max(map(len, shown.splitlines())) <= 80, shown


def test_hostile_values_arrive_as_they_are(cluster, tmp_path):
    hostile = ["$(touch PWNED)", "'; touch PWNED; '", '"\\\n`touch PWNED`', "a  b", "%j", ""]
    comment = "say \"hi\" 'x' \\b $(touch PWNED) `touch PWNED` # no; --uid=0"
    folder = tmp_path / 'it\'s a "$(touch PWNED)" folder'
    job = cluster.submit(
        folder, "say", "said.json", *hostile, environment={"HOSTILE": hostile[2]}, run="my 'run' $(touch PWNED)",
        extra_sbatch={"comment": comment},
    )  # fmt: skip
    job.wait_for_end("COMPLETED", "FAILED")
    said = json.loads((folder / "said.json").read_text())
    assert said["words"] == hostile
    assert said["environment"]["HOSTILE"] == hostile[2]
    assert cluster.run("squeue", "-h", "-t", "all", "-j", job.id, "-o", "%k") == comment + "\n"
    assert list(tmp_path.rglob("PWNED")) == []


def test_a_failing_rank_ends_the_job_with_its_exit_code(cluster, tmp_path):
    job = cluster.submit(tmp_path, "fail")
    job.wait_for_end("FAILED", "COMPLETED")
    assert job.facts() == ("FAILED", "7:0", 0), job.story()
    logs = cluster.run(*LAUNCH, "logs", tmp_path / "run")
    assert re.search(r"^node2:3 \| === life 1 node2 rank 3 ", logs, re.MULTILINE), logs


@pytest.mark.parametrize(
    ("limit", "chain"),
    [("signal", 1), *[pytest.param("time limit", chain, marks=pytest.mark.faults) for chain in (1, 4)]],
)
def test_a_run_goes_on_over_time_limits_as_if_there_were_none(cluster, tmp_path, limit, chain):
    """The job is queued again, or the next one of its chain follows."""
    run, steps = Recorded(tmp_path / "run"), 60 if limit == "signal" else 900  # of 0.1 s
    job = cluster.submit(
        tmp_path, command=[sys.executable, str(TRAINER), str(run.run), str(steps), "0.1"], chain=chain, requeue=chain == 1,
        time_limit_min=2, save_before_end_s=59, environment={"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    if limit == "signal":  # as Slurm gives it within the first minute of the two
        run.wait_for(lambda: run.step() > 5, "step 5")
        cluster.run("scancel", "--signal=USR1", "--batch", job.id)
    cluster.wait_for((run.run / "done.json").exists, job, 300)
    cluster.wait_for(lambda: cluster.run("squeue", "-h", "-n", "probe") == "", job)
    run.check_exact(steps)
    ends = run.events("job_end")
    assert [event["code"] for event in ends] == [85] * (len(ends) - 1) + [0] and len(ends) > 1, job.story()
    states = [event["job"].partition("-")[0] for event in run.events("job_start")]
    assert (len(set(states)) == 1) == (chain == 1), job.story()
    assert job.facts()[:2] == (("COMPLETED", "0:0") if chain == 1 else ("FAILED", "85:0")), job.story()


@pytest.mark.parametrize("mode", ["REQUEUE", "CANCEL"])
def test_a_preempted_job_goes_on(cluster, tmp_path, mode):
    """Where the cluster cancels what it preempts, a new job takes its place."""
    if mode == "CANCEL":
        cluster.run("scontrol", "update", "PartitionName=spot", "PreemptMode=cancel")
    job = cluster.submit(tmp_path, "train", partition="spot")
    job.wait_until_ready()
    cluster.run("sbatch", "-p", "main", "-N", 3, "--exclusive", "-t", 1, "-o", tmp_path / "other", "--wrap", "sleep 1")
    if mode == "CANCEL":
        job = job.follow()
    job.wait_for_end("COMPLETED", "FAILED")
    assert job.facts() == ("COMPLETED", "0:0", 1 if mode == "REQUEUE" else 0), job.story()
    assert job.rank_logs().count("saved\n") == 4


def test_a_job_that_scancel_ends_saves_and_stays_so_until_it_is_resumed(cluster, tmp_path):
    job = cluster.submit(tmp_path, "train")
    job.wait_until_ready()
    cluster.run("scancel", job.id)
    job.wait_for_end("CANCELLED")
    cluster.wait_for(lambda: cluster.run("squeue", "-h", "-j", job.id) == "", job)
    assert job.rank_logs().count("saved\n") == 4, job.story()
    assert re.search("^state +stopped: ", cluster.run(*LAUNCH, "status", tmp_path / "run"), re.MULTILINE)
    again = job.again(cluster.run(*LAUNCH, "resume", tmp_path / "run"))
    again.wait_for_end("COMPLETED", "FAILED")
    assert again.facts()[:2] == ("COMPLETED", "0:0"), again.story()


def test_of_a_run_one_job_runs_and_cancel_ends_its_chain(cluster, tmp_path):
    job = cluster.submit(tmp_path, "train", chain=2)
    with pytest.raises(
        AssertionError, match=rf"job {job.id} of this run is (pending|running|configuring). Wait for it"
    ):
        cluster.submit(tmp_path, "train")
    job.wait_until_ready()
    cluster.run(*LAUNCH, "cancel", tmp_path / "run")
    job.wait_for_end("FAILED")
    cluster.wait_for(lambda: not cluster.run("squeue", "-h", "-n", "probe"), job)
    assert job.facts()[1] == "85:0" and job.rank_logs().count("saved\n") == 4, job.story()


def test_a_job_that_somebody_queues_again_goes_on(cluster, tmp_path):
    job = cluster.submit(tmp_path, "train")
    job.wait_until_ready()
    cluster.run("scontrol", "requeue", job.id)
    job.wait_for_end("COMPLETED", "FAILED")
    assert job.facts() == ("COMPLETED", "0:0", 1), job.story()


def test_a_submission_while_the_controller_is_killed_is_one_job(cluster, tmp_path):
    cluster.lab("daemon", "ctl", "kill")
    submission = cluster.start_submit(tmp_path, "say", "said.json", nodes=1)
    time.sleep(4)
    assert submission.poll() is None
    shown = cluster.run(*LAUNCH, "list", tmp_path)  # bounded, and from the run's own files
    assert "unknown" in shown, shown
    cluster.lab("daemon", "ctl", "start")
    printed, said = submission.communicate(timeout=LIMIT_S)
    assert submission.returncode == 0, said
    assert "Asking again" in said
    job = cluster.job(tmp_path, printed)
    job.wait_for_end("COMPLETED", "FAILED")
    lines = cluster.run("squeue", "-h", "-t", "all", "-n", "probe", "-o", "%i %o").splitlines()
    assert sum(str(tmp_path) in line for line in lines) == 1, lines


@pytest.mark.parametrize("rounds", [2, pytest.param(25, marks=pytest.mark.faults)])
def test_jobs_packed_on_one_node_find_ports(cluster, tmp_path, rounds):
    """Also where the port that everybody takes is taken."""
    take = "import socket, time; s = socket.create_server(('', 29500)); print('taken', flush=True); time.sleep(3600)"
    command = [LAB, "-d", cluster.place, "exec", "-n", "node1", sys.executable, "-c", take]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout.readline() == "taken\n"
            for number in range(rounds):
                places = [tmp_path / f"{number}-{one}" for one in range(4)]
                keys = {"nodes": 1, "gpus_per_node": 1, "gpu_request": "none", "extra_sbatch": {"nodelist": "node1"}}
                started = [cluster.start_submit(place, "port", **keys) for place in places]
                jobs = [
                    cluster.job(place, one.communicate(timeout=60)[0])
                    for place, one in zip(places, started, strict=True)
                ]
                for job in jobs:
                    job.wait_for_end("COMPLETED", "FAILED")
                    assert job.facts()[1] == "0:0" and "in use" not in job.rank_logs(), job.story()
                    lives = [event for event in read_launch_events(job.run) if event["event"] == "life_start"]
                    assert len(lives) == 1, job.story()
        finally:
            other.kill()


def test_what_sbatch_refuses_is_refused_in_one_line(cluster, tmp_path):
    with pytest.raises(AssertionError, match=r"^error: sbatch refused the job: .*[Ii]nvalid partition.*\n"):
        cluster.submit(tmp_path, "say", partition="nowhere")
    plan = cluster.run(*LAUNCH, "plan", tmp_path / "job.yaml")
    assert re.search(r"^start +would be refused: .*nvalid partition", plan, re.MULTILINE), plan


def test_the_plan_tells_when_and_where(cluster, tmp_path):
    file = cluster.write_job(tmp_path, "say", "said.json")
    plan = cluster.run(*LAUNCH, "plan", file)
    assert re.search(r"^start +to start at \d{4}-.* using 4 processors on nodes node\[1-2\]", plan, re.MULTILINE), plan
    assert re.search(r"^GPU-hours +0\.7 a job", plan, re.MULTILINE), plan
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "golden", sorted((Path(__file__).parent / "golden").glob("*.sbatch")), ids=lambda path: path.stem
)
def test_sbatch_accepts_the_scripts(cluster, golden):
    """Their directives, but for what names things that this cluster does not have."""
    for text in re.split(r"^(?=#!)", golden.read_text(), flags=re.MULTILINE)[1:]:
        kept = [line for line in text.splitlines() if not re.match(
            "#SBATCH --(partition|account|qos|constraint|reservation|exclude|chdir|nodes|cpus-per-task|mem|array|gres|gpus-per-node)",
            line)]  # fmt: skip
        script = tmp_script(cluster.folder, "\n".join(kept))
        cluster.run("sbatch", "--test-only", script)


def tmp_script(folder: Path, text: str) -> Path:
    path = folder / "golden.sbatch"
    path.write_text(text + "\n")
    return path


def submit_array(cluster, folder: Path, **keys) -> tuple[str, str]:
    """Submit 4 tasks and a job after them; the numbers of both."""
    values = {
        "kind": "slurm_array", "name": "array", "tasks": 4, "cpus_per_task": 1, "memory_gib": 1, "time_limit_min": 10,
        "working_directory": str(folder), "output": "logs", "environment": {"PYTHONPATH": str(ROOT)}, **keys,
    }  # fmt: skip
    file = folder / "job.yaml"
    file.write_text(json.dumps(values))
    printed = cluster.run(sys.executable, "-m", "launch", "submit", file)
    array, last = re.search(r"^job     (\d+), 4 tasks$(?:.|\n)*^then    (\d+),", printed, re.MULTILINE).groups()
    scripts = [(folder / "logs" / f"{name}.sbatch").read_text() for name in (f"array-{array}", f"array-then-{last}")]
    assert "\n".join(scripts) == cluster.run(sys.executable, "-m", "launch", "render", file)
    return array, last


def wait_for_states(cluster, job_id: str, folder: Path) -> list[str]:
    """The states in which all tasks of a job have ended."""

    def logs() -> str:
        return "".join(f"{path.name}: {path.read_text()}" for path in sorted((folder / "logs").glob("*.log")))

    end = time.monotonic() + 2 * LIMIT_S
    while True:
        states = re.findall(r"JobState=(\w+)", cluster.run("scontrol", "show", "job", job_id))
        if not set(states) & {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING"}:
            return states
        assert time.monotonic() < end, f"waited too long: {states}\n{logs()}"
        time.sleep(0.2)


def test_an_array_of_tasks_builds_what_one_process_builds(cluster, tmp_path):
    from data_tools.build import build_shards
    from data_tools.scenes import draw_scenes

    draw_scenes(tmp_path / "scenes", count=40, val_count=8, processes=1)
    table, images = tmp_path / "scenes" / "captions.tsv", tmp_path / "scenes" / "images"
    build_shards(table, tmp_path / "local", images, samples_per_shard=8, processes=1)
    build = [sys.executable, "-m", "data_tools", "build", str(table), "out", "--image-root", str(images)]
    array, last = submit_array(
        cluster,
        tmp_path,
        command=[*build, "--samples-per-shard", "8", "--processes", "1"],
        then=[sys.executable, "-m", "data_tools", "finish", "out"],
    )
    assert wait_for_states(cluster, last, tmp_path) == ["COMPLETED"]
    assert wait_for_states(cluster, array, tmp_path) == ["COMPLETED"] * 4
    logs = {path.name for path in (tmp_path / "logs").glob("*.log")}
    assert logs == {f"array-then-{last}.log", *(f"array-{array}_{task}.log" for task in range(1, 5))}
    assert "task 3 of 4 is done: 1 of 6 shards" in (tmp_path / "logs" / f"array-{array}_3.log").read_text()
    made = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert len(json.loads(made["manifest.json"])["shards"]) == 6
    assert made == {path.name: path.read_bytes() for path in (tmp_path / "local").iterdir()}


def test_after_a_task_that_fails_nothing_follows(cluster, tmp_path):
    array, last = submit_array(
        cluster, tmp_path, command=["sh", "-c", 'test "$0" != 3', "{task}"], then=["touch", "finished"]
    )
    assert sorted(wait_for_states(cluster, array, tmp_path)) == ["COMPLETED"] * 3 + ["FAILED"]
    assert wait_for_states(cluster, last, tmp_path) == ["CANCELLED"]
    assert not (tmp_path / "finished").exists()

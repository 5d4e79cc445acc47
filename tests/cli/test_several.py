"""Commands that torchrun starts: the first process speaks, and what cannot be shared is refused in one sentence."""

import pytest

COMMANDS = [("peel", "smollm2"), ("compare", "old", "new"), ("verify", "folder"), ("watch", "run.db")]


@pytest.fixture
def torchrun(monkeypatch):
    def started(rank, *, count=2, by="torchrun"):
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}.items():
            monkeypatch.setenv(name, str(value))
        if by == "torchrun":
            monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")

    return started


@pytest.mark.parametrize("arguments", COMMANDS, ids=lambda each: each[0])
def test_a_command_of_one_process_is_refused_by_the_first_alone(run, torchrun, arguments):
    torchrun(0)
    code, out, err = run(*arguments)
    assert code == 2
    assert out == ""
    assert err.strip() == (
        f"error: peelwise {arguments[0]} runs in one process, and torchrun has started 2: leave torchrun out. Of all "
        "commands, audit and check share their work."
    )
    torchrun(1)
    assert run(*arguments) == (0, "", "")  # with a code, torchrun would end the first before it has spoken


def test_a_device_that_cannot_be_one_for_each_is_refused(run, torchrun):
    torchrun(0)
    code, _, err = run("audit", "smollm2", "--device", "mps")
    assert code == 2
    assert "Each of 2 processes runs on a device of its own: --device cuda or cpu, not mps." in err


def test_what_a_cluster_sets_for_any_program_is_not_torchrun(run, torchrun):
    torchrun(1, by="a cluster")
    code, _, err = run("peel", "/nowhere")
    assert code == 2
    assert "/nowhere not found" in err


def test_help_is_told_by_the_first(run, torchrun):
    torchrun(1)
    assert run("audit", "--help") == (0, "", "")
    torchrun(0)
    assert "torchrun --nproc-per-node 2" in " ".join(run("audit", "--help")[1].split())


def test_one_process_has_nobody_to_spread_a_model_over(run, tmp_path):
    code, _, err = run("audit", tmp_path, "--shard")
    assert code == 2
    assert err.strip().splitlines()[-1] == (
        "error: --shard spreads the weights over several processes, and there is one: start torchrun --nproc-per-node "
        "N -m peelwise audit MODEL --shard."
    )

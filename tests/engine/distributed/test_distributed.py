"""Several processes against one: the same run.

`ranks.py` is what the processes do; it runs once with two of them and once with four. `ranks_hf.py`
is started by torchrun.
"""

import multiprocessing
import socket
from pathlib import Path

import pytest
import ranks
import ranks_cut
import torch

import zokernels as zk

WORLDS = (2, 4)
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Where the processes leave what they found; a run of one process, to be resumed, is there."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "taken").touch()
    one = ranks.network(torch.float32)
    opt = ranks.make(one, "adam", num_queries=4)
    opt.record(folder / "run.zk")
    ranks.train(one, opt, dtype=torch.float32)
    opt.trajectory.close()
    return folder


@pytest.fixture(scope="module")
def found(out):
    """What each process of each number of them returned: found[world][rank][case]."""
    results = {}
    for world in WORLDS:
        # The second resumes what the first one left.
        launch(ranks_cut.main, world, out)
        results[world] = [
            torch.load(out / f"{world}-{r}.pt", weights_only=False) for r in range(world)
        ]
    return results


def launch(case, world, out, fine=True):
    """Runs a case of `ranks` in so many processes; their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    # One import of torch for all of them.
    context.set_forkserver_preload(["ranks"])
    processes = [
        context.Process(target=ranks.begin, args=(case, rank, world, port, out), daemon=True)
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=400)
        if process.is_alive():
            process.kill()
            process.join()
    codes = [process.exitcode for process in processes]
    errors = [path.read_text() for path in sorted(out.glob("error-*"))]
    assert not fine or codes == [0] * world, errors
    return codes


@pytest.fixture(scope="module")
def alone():
    """The runs of one process; each is made once."""
    made = {}

    def of(run, *args):
        key = (run.__name__, *args)
        if key not in made:
            made[key] = run(*args)
        return made[key]

    return of


def each(found, world, case):
    """What the processes returned for a case, after a look that their weights are the same."""
    results = [process[case] for process in found[world]]
    for result in results[1:]:
        assert same(result["weights"], results[0]["weights"])
    return results


def same(a, b):
    return len(a) == len(b) and all(map(torch.equal, a, b))


def close(a, b):
    # The mean of the shares' losses is rounded otherwise than the whole batch's: by 1e-16, which a
    # difference over 2ε and four steps make some 1e-12 of.
    return all(torch.allclose(x, y, rtol=0, atol=1e-10) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", ranks.OPTIMIZERS)
def test_shares_of_a_batch_make_the_run_of_the_whole_batch(found, alone, world, name):
    result, one = each(found, world, f"data {name}")[0], alone(ranks.data, name)
    assert close(result["weights"], one["weights"])
    assert result["losses"] == pytest.approx(one["losses"], abs=1e-10)
    assert not close(one["weights"], [p.detach() for p in ranks.network().parameters()])


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", ranks.OPTIMIZERS)
def test_parts_of_the_directions_make_the_same_bits(found, alone, world, name):
    result, one = each(found, world, f"query {name}")[0], alone(ranks.query, name)
    assert same(result["weights"], one["weights"])
    assert result["losses"] == one["losses"]


@pytest.mark.parametrize("world", WORLDS)
def test_members_are_shared_out_and_told_together(found, alone, world):
    one = alone(ranks.asked)
    for result in each(found, world, "asked"):
        assert same(result["weights"], one["weights"])
        assert result["members"] == one["members"] // world == 8 // world


def test_shares_and_directions_at_once(found):
    one = ranks.network()
    losses = ranks.train(one, ranks.make(one, num_queries=4))
    result = each(found, 4, "both")[0]
    assert close(result["weights"], ranks.weights(one))
    assert result["losses"] == pytest.approx(losses, abs=1e-10)


def test_two_runs_of_two_processes_each_beside_each_other(found, out):
    for run in range(2):
        one = ranks.network()
        ranks.train(one, ranks.make(one, seed=run))
        pair = [found[4][2 * run + i]["two_runs"] for i in range(2)]
        assert [result["rank"] for result in pair] == [0, 1]
        assert same(pair[0]["weights"], pair[1]["weights"])
        assert close(pair[0]["weights"], ranks.weights(one))
        again = ranks.network()
        zk.replay(again, out / f"beside-{run}.zk")
        assert same(ranks.weights(again), pair[0]["weights"])


@pytest.mark.parametrize("world", WORLDS)
def test_a_step_sends_at_most_64_bytes(found, world):
    for process in found[world]:
        assert 16 <= process["traffic"] <= 64


@pytest.mark.parametrize("world", WORLDS)
def test_a_loss_that_is_not_finite_on_one_is_skipped_by_all(found, world):
    for result in each(found, world, "not_finite"):
        assert result["same"] and result["bad"] == 1 and result["after"] == 0
        assert result["loss"] != result["loss"]


@pytest.mark.parametrize("world", WORLDS)
def test_a_forward_that_fails_on_one_is_told_to_all_and_the_run_goes_on(found, world):
    for rank, result in enumerate(each(found, world, "failing")):
        assert result["same"]
        expected = "no memory left" if rank == 1 else "A forward of step 1 failed on rank 1"
        assert expected in result["message"]


@pytest.mark.parametrize("world", WORLDS)
def test_the_one_whose_weights_strayed_is_named(found, world):
    for process in found[world]:
        assert f"Rank {world - 1} of {world} has strayed" in process["straying"]
        assert "before step 2 its parameter '2.bias'" in process["straying"]


@pytest.mark.parametrize("world", WORLDS)
def test_other_settings_start_or_step_are_named(found, world):
    for process in found[world]:
        result = process["other_settings"]
        assert result["lr"].startswith("Rank 1 has lr 0.03, but the others have 0.02")
        assert "Rank 1" in result["start"] and "'0.weight'" in result["start"]
        assert result["step"].startswith("Rank 1 is at step 2, but the others are not")


@pytest.mark.parametrize("world", WORLDS)
def test_what_several_processes_cannot_do_is_refused(found, world):
    for process in found[world]:
        result = process["refused"]
        assert "HybridZO's deep part has gradients" in result["hybrid"]
        assert f"num_queries is {world + 1}" in result["queries"]
        assert f"there are {world}" in result["layout"]
        assert "'auto', 'data', 'query', None" in result["unknown"]


def test_a_log_of_two_or_four_is_that_of_one(found, out, alone):
    one = ranks.network(torch.float32)
    zk.replay(one, out / "run.zk")
    for world in WORLDS:
        results = each(found, world, "recorded")
        # A file that exists is left alone, and every process says so.
        assert all("exists" in result["taken"] for result in results)
        again = ranks.network(torch.float32)
        zk.replay(again, out / f"run-{world}.zk")
        assert same(ranks.weights(again), results[0]["weights"])


def test_a_run_goes_on_with_another_number_of_processes(found, out):
    # One process began it, two went on from step 3, four again, and here one.
    straight = ranks.network(torch.float32)
    opt = ranks.make(straight, "adam", num_queries=4)
    ranks.train(straight, opt, range(ranks.STEPS + 1), dtype=torch.float32)
    for world in WORLDS:
        results = each(found, world, "resumed")
        assert same(results[0]["weights"], ranks.weights(straight))
        assert all("cannot be read" in result["missing"] for result in results)
    assert len(zk.Trajectory(out / "run.zk").steps) == ranks.STEPS + 1
    model = ranks.network(torch.float32)
    opt = ranks.make(model, "adam", num_queries=4)
    opt.resume(out / "run.zk", until=2).close()
    assert opt.param_groups[0]["step"] == 2


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", ranks_cut.SHARDED)
def test_weights_cut_by_fsdp_make_the_same_bits(found, world, name):
    one = ranks.network()
    losses = ranks.train(one, ranks.make(one, name, **ranks_cut.SHARDED[name]))
    results = each(found, world, f"fsdp {name}")
    assert same(results[0]["weights"], ranks.weights(one))
    assert results[0]["losses"] == losses
    total = sum(p.numel() for p in one.parameters())
    assert sum(result["held"] for result in results) == total
    assert max(result["held"] for result in results) < total


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", ["adam", "rank1-in-place"])
def test_bfloat16_weights_and_states_cut_by_fsdp(found, world, name):
    one = ranks.network(torch.bfloat16)
    ranks.train(one, ranks.make(one, name, **ranks_cut.IN_16_BITS), dtype=torch.bfloat16)
    assert same(each(found, world, f"16 bits {name}")[0]["weights"], ranks.weights(one))


@pytest.mark.parametrize("world", WORLDS)
def test_cut_weights_and_shares_of_the_batch(found, world):
    for process in found[world]:
        result = process["fsdp_shares"]
        assert same(result["sharded"], result["whole"])


@pytest.mark.parametrize("world", WORLDS)
def test_an_exception_leaves_cut_weights_as_they_were(found, world):
    one = ranks.network()
    ranks.train(one, ranks.make(one))
    for result in each(found, world, "fsdp_interrupted"):
        assert "interrupted" in result["message"] and result["same"]
        assert same(result["weights"], ranks.weights(one))


@pytest.mark.parametrize("world", WORLDS)
def test_a_loss_that_is_not_finite_with_cut_weights(found, world):
    for process in found[world]:
        assert process["fsdp_not_finite"] == dict(same=True, bad=1)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", ["momentum", "rank1-in-place"])
def test_the_log_of_cut_weights_is_that_of_whole_ones(found, out, world, name):
    for result in each(found, world, f"recorded {name}"):
        assert same(result["weights"], result["resumed"])
    whole = ranks.network()
    zk.replay(whole, out / f"sharded-{name}-{world}.zk")
    assert same(ranks.weights(whole), result["weights"])


@pytest.mark.parametrize("world", WORLDS)
def test_what_cut_weights_cannot_do_is_refused(found, world):
    for process in found[world]:
        result = process["fsdp_refused"]
        assert "use perturb='in_place'" in result["on_entry"]
        assert "no forward-mode derivative" in result["forward"]
        assert "gives them different directions" in result["query"]
        assert "Bits" in result["bits"]
        for message, expected in zip(
            result["lists"],
            (
                "streams has 3 numbers, but params has 4",
                "columns has 5 numbers, but params has 4",
                "columns is 6, but it must be a list",
                "columns are given, but dist is 'gaussian'",
            ),
            strict=True,
        ):
            assert expected in message


def test_copies_of_cut_weights_with_directions_of_their_own(found):
    one = ranks.network()
    ranks.train(one, ranks.make(one, num_queries=4))
    results = each(found, 4, "hsdp")
    assert close(results[0]["weights"], ranks.weights(one))
    # Ranks 1 and 3 hold the same part.
    assert all("Rank 3 of 4 has strayed" in result["stray"] for result in results)


@pytest.mark.parametrize("world", WORLDS)
def test_a_part_of_any_dimension_has_the_noise_of_its_place(found, world):
    for process in found[world]:
        result = process["uneven"]
        assert [where for where, fits in result.items() if not fits] == []
        # Two distributions, three shapes, four placements of a line and two of a grid.
        assert len(result) == 2 * 3 * (6 if world == 4 else 4)


@pytest.mark.parametrize(
    "world, case",
    [(2, "tensor parallel"), (4, "tensor parallel"), (4, "tensor parallel and fsdp")],
)
def test_weights_cut_by_tensor_parallelism(found, world, case):
    for result in each(found, world, case):
        assert "Shard(dim=1)" in result["placements"][2]
        assert same(result["moved"], result["wanted"])
        # A row times a column is summed in another order, by parts.
        assert close(result["weights"], result["plain"])
        assert result["losses"][0] == pytest.approx(result["losses"][1], abs=1e-10)

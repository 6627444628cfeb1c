"""Threads that each compute on one core, and leave the number of threads as they found it."""

import threading

import pytest
import torch

from blipcore.lanes import lanes

CPU = torch.device("cpu")


def threads_of_a_new_thread() -> int:
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


@pytest.fixture
def threads():
    """PyTorch computes with three threads while the test lasts."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(before)


def test_there_are_as_many_lanes_as_threads_and_each_computes_alone(threads):
    with lanes(CPU) as (count, pool):
        meet = threading.Barrier(threads, timeout=20)
        found = list(pool.map(lambda _: (meet.wait(), torch.get_num_threads())[1], range(count)))
        assert count == threads and found == [1, 1, 1]
        assert torch.get_num_threads() == threads and threads_of_a_new_thread() == threads
        with lanes(CPU) as (again, _):  # another library's
            assert again == threads
    assert torch.get_num_threads() == threads and threads_of_a_new_thread() == threads


def test_an_error_leaves_the_number_of_threads_as_it_was(threads):
    with pytest.raises(ValueError), lanes(CPU) as (_, pool):
        pool.submit(torch.get_num_threads).result()
        raise ValueError
    assert threads_of_a_new_thread() == threads


def test_a_gpu_has_one_lane_with_all_threads(threads):
    with lanes(torch.device("cuda")) as (count, pool):
        assert count == 1 and pool.submit(torch.get_num_threads).result() == threads


def test_what_was_not_begun_is_forgotten(threads):
    begun, go_on = [], threading.Event()

    def work(number):
        begun.append(number)
        go_on.wait(20)

    with lanes(CPU) as (_, pool):
        for number in range(50):
            pool.submit(work, number)
        threading.Timer(0.2, go_on.set).start()
    assert len(begun) <= threads

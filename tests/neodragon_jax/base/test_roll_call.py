"""Tests of the roll call: if a cluster cannot start, every running process reports the reason."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from neodragon_jax.base import roll_call
from neodragon_jax.base.errors import InputError
from neodragon_jax.base.roll_call import roll_call as call

TIMEOUT_S = 3.0


@pytest.fixture
def port() -> int:
    """Return an unused port."""
    with socket.socket() as listener:
        listener.bind(('localhost', 0))
        return listener.getsockname()[1]


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """Print the missing processes often."""
    monkeypatch.setattr(roll_call, 'NOTICE_EVERY_S', 0.5)


def outcomes(port: int, *processes: tuple[int, int]) -> list[str]:
    """Return the result of the roll call for each (number of processes, index): '' or its error message."""
    results = [''] * len(processes)

    def run(place: int, count: int, index: int) -> None:
        try:
            call(f'localhost:{port}', count, index, TIMEOUT_S)
        except InputError as error:
            results[place] = str(error)

    threads = [threading.Thread(target=run, args=(place, *process)) for place, process in enumerate(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return results


def test_complete_cluster_starts_and_leaves_the_port_free(port):
    assert outcomes(port, (3, 2), (3, 0), (3, 1)) == ['', '', '']
    with socket.create_server(('', port)):
        pass


def test_missing_process_is_named_on_all_others(port, capsys):
    for message in outcomes(port, (3, 0), (3, 1)):
        assert message.startswith('process 2 of 3 did not start within 3 s')
    assert 'waiting for process 2 of 3 to start' in capsys.readouterr().err


def test_missing_coordinator_is_named(port, capsys):
    (message,) = outcomes(port, (2, 1))
    assert message.startswith(f'process 0 of 2 did not answer at localhost:{port} within 3 s')
    assert f'waiting for process 0 of 2 at localhost:{port}' in capsys.readouterr().err


def test_host_that_is_not_known_is_named(port):
    """It may have just started, so the process asks again until the time is over."""
    with pytest.raises(InputError, match=r'did not answer at nowhere\.invalid:\d+, a host that is not known here,'):
        call(f'nowhere.invalid:{port}', 2, 1, 0.5)


def test_doubled_number_is_named(port):
    messages = outcomes(port, (3, 0), (3, 1), (3, 1))
    assert all('process 1 was started twice' in message for message in messages), messages


def test_disagreement_on_the_number_is_named(port):
    messages = outcomes(port, (2, 0), (3, 1))
    assert all('do not agree on their number' in message for message in messages), messages


def test_port_in_use_is_named(port):
    with socket.create_server(('', port)):
        assert outcomes(port, (2, 0)) == [
            f'port {port} is in use; choose another one in JAX_COORDINATOR_ADDRESS, or end the run that holds it.'
        ]


def test_strangers_do_not_disturb(port):
    result: list[str] = []
    coordinator = threading.Thread(target=lambda: result.extend(outcomes(port, (2, 0))))
    coordinator.start()
    for _ in range(100):
        try:
            with socket.create_connection(('localhost', port), timeout=5) as stranger:
                stranger.sendall(b'GET / HTTP/1.1\n')
            break
        except OSError:
            time.sleep(0.02)
    else:
        pytest.fail('process 0 does not listen')
    assert outcomes(port, (2, 1)) == ['']
    coordinator.join(30)
    assert result == ['']


@pytest.mark.parametrize('address', ['host', 'host:', ':80', 'host:99999', 'host:x'])
def test_wrong_addresses_are_refused(address):
    with pytest.raises(InputError, match='give host:port of process 0'):
        call(address, 2, 0, TIMEOUT_S)

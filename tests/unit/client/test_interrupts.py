"""A training loop of an embedded pool that is interrupted wherever Python looks for signals: nothing stays taken."""

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import faulthandler, itertools, sys
import torch
import mempool

faulthandler.dump_traceback_later(60, exit=True)  # what would wait for ever ends here
PLACES = ("/mempool/", "/numba/", "/multiprocessing/")
IDS = torch.tensor([[1, 40, 2], [60, 3, 33]])
left = 0

def interrupt(frame, event, _):
    global left
    if event in ("call", "return", "c_return") and any(place in frame.f_code.co_filename for place in PLACES):
        left -= 1
        if not left:
            raise KeyboardInterrupt

def step():
    weights = torch.rand(2, 3, requires_grad=True)
    table.gather(IDS, weights).sum().backward()

pool = mempool.local(shards=2)
table = pool.create_table(
    mempool.TableConfig(name="facts", num_slots=64, value_dim=4, page_slots=8, layout="rows")
)
step()
table.commit()
for places in itertools.count(1):
    left = places
    sys.setprofile(interrupt)
    try:
        step()
    except KeyboardInterrupt:
        pass
    finally:
        sys.setprofile(None)
    torch.set_grad_enabled(True)
    if left > 0:
        break
assert places > 100, places
table.discard()
step()
assert table.commit() == 1
pool.close()
print(places, "places")
"""


def test_an_interrupt_anywhere_leaves_nothing_taken() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]

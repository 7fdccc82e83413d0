"""How processes that were started together find one another, also where others were before them.

torchrun keeps one store over all of its restarts, and PyTorch looks up the addresses of the other ranks in it without
regard to which start they are of: a rank that comes back sooner than another finds the address of the one that died,
and its connection is refused.  The count of restarts that torchrun tells does not help, since each machine counts its
own.  Here the ranks first agree on a name that no earlier start had; everything else is stored under it.
"""

from __future__ import annotations

import hashlib
import time
import uuid

from torch.distributed import DistError
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from tercet.errors import TercetError

PAUSE = 0.02  # seconds between looks into the store


def fresh_store() -> tuple[Store, int, int]:
    """A store that the processes of this start alone use, this one's rank, and how many there are.

    Raises:
        TercetError: the others do not come.
    """
    store, rank, world = next(rendezvous("env://"))
    return PrefixStore(agree_on_name(store, rank, world), store), rank, world


def agree_on_name(store: Store, rank: int, world: int) -> str:
    """A name that every process of this start gets, and none of an earlier one.

    Each shows a token of its own.  The first rank proposes what it finds, again and again, since some of it may be of
    an earlier start; the others agree to a proposal that holds their own token.  What all agree to holds no other.

    Args:
        store: where all processes read and write, and earlier ones may have.
        rank: of this process.
        world: how many there are.

    Raises:
        TercetError: the others do not come within the store's timeout.
    """
    store = PrefixStore("tercet/meeting", store)
    deadline = time.monotonic() + store.timeout.total_seconds()  # pyright: ignore[reportAttributeAccessIssue] - not in its stub
    own = uuid.uuid4().hex
    store.set(f"token/{rank}", own)
    try:
        while time.monotonic() < deadline:
            if rank == 0:
                tokens = b",".join(store.get(f"token/{other}") for other in range(world))
                store.set("proposal", tokens.decode())
            else:
                tokens = store.get("proposal")
            name = hashlib.sha256(tokens).hexdigest()
            if own.encode() in tokens.split(b","):
                if rank == 0 and store.check([f"{name}/agreed/{other}" for other in range(1, world)]):
                    store.set(f"{name}/settled", "")
                    return name
                if rank != 0:
                    store.set(f"{name}/agreed/{rank}", "")
                    if store.check([f"{name}/settled"]):
                        return name
            time.sleep(PAUSE)
    except DistError as error:
        raise TercetError(_absent(world)) from error
    raise TercetError(_absent(world))


def _absent(world: int) -> str:
    return f"not all of the {world} processes came; see what the others said"

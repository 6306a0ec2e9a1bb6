"""A table's usage, asked of the shards that count it: sums and histograms, never the counts themselves. One try."""

from functools import reduce
from operator import add

from mempool.client.routing.fanout import Fanout
from mempool.errors import Internal
from mempool.types import Envelope, ShardHost
from mempool.types.usage import BINS, Tally, Usage, UsageReply, UsageRequest, usage_of


async def ask_usage(fanout: Fanout, *, older_than: int) -> Usage:
    """Of all slots; the owners of block 0 know, and each slot's is one."""

    async def ask(host: ShardHost, envelope: Envelope) -> UsageReply:
        reply = await host.usage(UsageRequest(envelope=envelope, older_than=older_than))
        fanout.traffic.add(received=reply.histogram.nbytes)
        if reply.histogram.shape != (BINS, 2):
            raise Internal(
                f"shard {reply.stamp.shard} counts uses in {list(reply.histogram.shape)} numbers, and not in [{BINS}, "
                "2]: do all run the same version of mempool?"
            )
        fanout.saw(reply.stamp.table_version)
        return reply

    replies = await fanout.each([(route.info, ask) for route in fanout.plan.routes if route.blocks[0] == 0])
    tallies = (
        Tally(outdated=reply.outdated, most=reply.most, log_sum=reply.log_sum, histogram=reply.histogram)
        for reply in replies
    )
    version = max(reply.stamp.table_version for reply in replies)
    return usage_of(reduce(add, tallies), version=version, older_than=older_than)

"""How often the slots of a table are used: what shards are asked and answer, and what that says of the table. Pure."""

from mempool.types.usage.messages import UsageReply, UsageRequest
from mempool.types.usage.report import SlotUsage, Usage, UsageBin, usage_of
from mempool.types.usage.tally import BINS, Tally

__all__ = ["BINS", "SlotUsage", "Tally", "Usage", "UsageBin", "UsageReply", "UsageRequest", "usage_of"]

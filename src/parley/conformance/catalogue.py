"""All sections, in the order in which they are run."""

from parley.conformance.checks import access, flow, frames, handshake, limits, replies, resume, sends, subscribe

SECTIONS = (
    handshake.section,
    frames.section,
    subscribe.section,
    resume.section,
    resume.merging,
    sends.idempotency,
    sends.queueing,
    replies.cancel,
    replies.again,
    replies.termination,
    limits.section,
    flow.acks,
    flow.heartbeat,
    access.credentials,
    access.isolation,
)

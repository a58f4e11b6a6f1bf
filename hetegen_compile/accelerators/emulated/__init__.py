"""Host memory played as a device: what is not waited for is an error here, whether or not the threads were lucky.

accelerator     the contract's methods
hazards         the rules, checked when an operation is issued: waits, slots, aliases, what is lent
clocks          what each lane knows of the others (vector clocks)
occupied        what lies in a ring, and when it may be overwritten
aliases         writes to memory that another value shows
values          futures, transfers, tokens: they refuse to be used as tensors
engine          the lanes: streams that are threads, their delays and their pace
streams         one thread and its queue
work            what the threads do
modes           grad, inference and autocast state of the caller, for a thread
pacing          lanes that take the seconds that the cost model predicts
ring            NaN wherever nothing valid lies
"""

from hetegen_compile.accelerators.emulated.accelerator import EmulatedAccelerator

__all__ = ["EmulatedAccelerator"]

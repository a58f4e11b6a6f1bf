"""What users see of a plan.

schedule  the report on one graph and bucket of tokens: figures, reasons, traces; ``hetegen_compile.schedules()``
table     the schedule as text; ``fold`` makes one line of equal layers
verdict   what splitting buys on a machine, in one sentence
"""

"""How the exits' thresholds are chosen from validation data.

`exit_table` keeps what every exit says of every sample, `calibrate` chooses on such a table.
"""

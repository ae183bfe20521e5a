"""Chooses the exits' thresholds on validation data.

`exit_table` stores the result of every exit for every sample; `calibrate` chooses from that table.
"""

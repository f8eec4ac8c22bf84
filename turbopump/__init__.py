"""Turbopump trains deep-learning models near the limit of the hardware and accounts for every second."""

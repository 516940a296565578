"""What an edit holds and what it costs: metrics, rows of results, reports. Imports: everything from
errors to model.
"""

"""From numbers to what they mean: intervals, verdicts, trends, events. No torch."""

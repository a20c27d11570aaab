"""TrAct in float64 on calls that were observed, and how far a result is off from it."""

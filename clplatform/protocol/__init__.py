"""What happens around a run so that a comparison is fair: tuning before it, reference runs beside it."""

"""Networks that recipes train."""

"""What an operator sees of it: metrics for Prometheus, traces for OpenTelemetry."""

"""Telemetry of a run: metrics, events, run manifest, trackers, profiles."""

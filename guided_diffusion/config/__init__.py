"""The YAML configuration: keys, reading, documentation."""

"""The door: HTTP over the job store. Knows tenants, problems and pages; no method, no model."""

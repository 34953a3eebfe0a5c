"""The auditor's tools: claims recomputed from what was published, and attacks that try to refute them."""

"""The protocol: what a second implementation or an auditor needs."""

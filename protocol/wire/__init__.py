"""Generated from proto/protocol/wire by `make wire`; a test compares it byte for byte."""

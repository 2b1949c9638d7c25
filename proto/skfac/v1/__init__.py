"""The generated protocol, version 1. Its comments in the .proto are its reference."""

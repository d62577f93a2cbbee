"""The lab: what the command line does with the engine, of which it uses public names only."""

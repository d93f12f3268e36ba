"""Mathematics only: arrays in, arrays out, each fast form beside a plain reference."""

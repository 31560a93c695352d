"""What an auditor needs, from files alone: a bundle of both shores' ledgers, and its verification."""

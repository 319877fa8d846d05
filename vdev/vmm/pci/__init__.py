"""The PCI bus of a machine: one root bus of functions without bridges."""

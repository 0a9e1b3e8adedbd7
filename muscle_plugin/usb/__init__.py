"""Everything that touches USB (``semilearn``): its imports, stand-ins and patched calls."""

"""Images changed at random, as timm's users know it: by draws for every image of an epoch, made on the CPU."""

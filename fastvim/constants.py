"""Statistics of data sets that models and data share, beside timm's of ImageNet."""

# Of JUMP-CP's eight channels, values in 0 to 255.
JUMPCP_MEAN = (4.0317, 1.5659, 3.7737, 3.4605, 4.1723, 6.7805, 6.7874, 6.7781)
JUMPCP_STD = (17.3184, 12.0159, 16.9661, 15.0648, 17.9641, 21.6388, 21.6706, 21.6395)

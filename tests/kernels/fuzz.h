// Bytes that are nearly packed weights.
#pragma once
#include "packed.h"

// How many of them did wrong without a sanitizer's noticing.
long fuzz(Random& random, long cases);

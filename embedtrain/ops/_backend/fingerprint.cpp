// Which declarations the library was built from: Python refuses one that was built from others.

#include <cstdint>

#ifndef EMBEDTRAIN_FINGERPRINT
#error "setup.py defines EMBEDTRAIN_FINGERPRINT, the fingerprint of embedtrain.h"
#endif

extern "C" {
extern const uint64_t embedtrain_fingerprint;
const uint64_t embedtrain_fingerprint = EMBEDTRAIN_FINGERPRINT;
}

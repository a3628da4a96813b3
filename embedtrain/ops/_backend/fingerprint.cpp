// The hash of the declarations that the library was built from. Python refuses a library with another hash.

#include <cstdint>

#ifndef EMBEDTRAIN_FINGERPRINT
#error "setup.py defines EMBEDTRAIN_FINGERPRINT, the fingerprint of embedtrain.h"
#endif

extern "C" {
extern const uint64_t embedtrain_fingerprint;
const uint64_t embedtrain_fingerprint = EMBEDTRAIN_FINGERPRINT;
}

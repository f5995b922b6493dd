// Loops over several threads.
#pragma once
#include <cstdint>

#include "secateur.h"

namespace sct {

// Calls body(context, i) once for every i below ``items``, on up to ``threads`` threads, the caller's among them.
// Threads take the next item when they are done with one, so items may be unequal.
void parallel(int64_t items, int threads, void (*body)(void*, int64_t), void* context);

template <class Body>
void parallel(int64_t items, int threads, Body&& body) {
    parallel(items, threads, [](void* self, int64_t i) { (*static_cast<Body*>(self))(i); }, &body);
}

}  // namespace sct

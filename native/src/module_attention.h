// What module.cpp binds from module_attention.cpp.
#pragma once
#include <nanobind/nanobind.h>

namespace prunus {

void bind_attention(nanobind::module_& m);

}  // namespace prunus

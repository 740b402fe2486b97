// What module.cpp binds from module_attention.cpp and module_token.cpp.
#pragma once
#include <nanobind/nanobind.h>

namespace prunus {

void bind_attention(nanobind::module_& m);
void bind_token(nanobind::module_& m);  // module_token.cpp

}  // namespace prunus

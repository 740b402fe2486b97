// What the files of the Python module share: checks of addresses and options.
#pragma once
#include <nanobind/nanobind.h>

#include <string>

#include "blob.h"
#include "run.h"
#include "sddmm.h"

namespace prunus {

// Raises the class of this name in prunus.errors.
[[noreturn]] void fail(const char* kind, const std::string& message);
[[noreturn]] void bad_value(const std::string& message);

const BlobHeader& checked_blob(uintptr_t address, bool tiles = false);
void check_floats(const char* name, uintptr_t address, bool needed);
Call checked_call(uintptr_t blob, uintptr_t x, uintptr_t y, int64_t n, uintptr_t bias,
                  uintptr_t residual, uint32_t flags, int threads, int isa);
SampledCall checked_sampled(uintptr_t blob, uintptr_t x, uintptr_t g, uintptr_t out, int64_t n,
                            bool accumulate, int threads, int isa);

// Without the interpreter lock; MemoryError where a kernel's memory cannot be had.
void execute(const Call& call);
void execute(const SampledCall& call);

void bind_convolutions(nanobind::module_& m);
void bind_moves(nanobind::module_& m);

}  // namespace prunus

// Products of groups of outputs, for driver.cpp.
#pragma once

// Runs them on every instruction set, tiles in software included; the number that failed.
int vector_cases(int* done);

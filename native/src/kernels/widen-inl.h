// Stored values as float32, exactly. Included within the namespace of an instruction set.
#pragma once

inline float widen(float value) { return value; }
inline float widen(int8_t value) { return value; }
inline float widen(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  __builtin_memcpy(&value, &wide, sizeof value);
  return value;
}

// Vector types and built-in variables.
#pragma once

#include <cstddef>
#include <cstdint>

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};

#define ELF_SHIM_VECTOR2(T, name)      \
  struct alignas(2 * sizeof(T)) name { \
    T x, y;                            \
  };                                   \
  inline name make_##name(T x, T y) { return {x, y}; }
#define ELF_SHIM_VECTOR4(T, name)      \
  struct alignas(4 * sizeof(T)) name { \
    T x, y, z, w;                      \
  };                                   \
  inline name make_##name(T x, T y, T z, T w) { return {x, y, z, w}; }
ELF_SHIM_VECTOR2(int, int2)
ELF_SHIM_VECTOR2(unsigned, uint2)
ELF_SHIM_VECTOR2(float, float2)
ELF_SHIM_VECTOR2(double, double2)
ELF_SHIM_VECTOR2(long long, longlong2)
ELF_SHIM_VECTOR2(unsigned long long, ulonglong2)
ELF_SHIM_VECTOR4(unsigned char, uchar4)
ELF_SHIM_VECTOR4(unsigned short, ushort4)
ELF_SHIM_VECTOR4(int, int4)
ELF_SHIM_VECTOR4(unsigned, uint4)
ELF_SHIM_VECTOR4(float, float4)
#undef ELF_SHIM_VECTOR2
#undef ELF_SHIM_VECTOR4

// Hidden, so that each shared library has its own variables. All its sources share them.
#pragma GCC visibility push(hidden)
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;
#pragma GCC visibility pop

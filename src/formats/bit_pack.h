// Codes of 3 and 6 bits, packed into 24-bit little-endian words: eight codes (int3) or four (FP6)
// in 3 bytes, code i from bit 3 i or 6 i on. A decoder with variable shifts takes a word apart by
// one broadcast and one shift a lane, one with byte multishift (VBMI) 64 codes at a time. The
// functions here do it in an integer register, for encoders and for targets without either.
#pragma once

#include <cstdint>

namespace thriftattn {

constexpr uint32_t load_u24(const uint8_t* in) {
  return in[0] | static_cast<uint32_t>(in[1]) << 8 | static_cast<uint32_t>(in[2]) << 16;
}

constexpr void store_u24(uint32_t word, uint8_t* out) {
  out[0] = static_cast<uint8_t>(word);
  out[1] = static_cast<uint8_t>(word >> 8);
  out[2] = static_cast<uint8_t>(word >> 16);
}

// Eight codes of 3 bits, code i in byte i of the result.
constexpr uint64_t spread_3bit(uint32_t word) {
  uint64_t x = (word & 0xfffu) | (uint64_t{word} & 0xfff000u) << 20;
  x = (x & 0x0000003f0000003fu) | (x & 0x00000fc000000fc0u) << 10;
  return (x & 0x0007000700070007u) | (x & 0x0038003800380038u) << 5;
}

constexpr uint32_t gather_3bit(uint64_t bytes) {
  uint64_t x = (bytes & 0x0007000700070007u) | (bytes >> 5 & 0x0038003800380038u);
  x = (x & 0x0000003f0000003fu) | (x >> 10 & 0x00000fc000000fc0u);
  return static_cast<uint32_t>((x & 0xfffu) | (x >> 20 & 0xfff000u));
}

// Four codes of 6 bits, code i in byte i of the result.
constexpr uint32_t spread_6bit(uint32_t word) {
  const uint32_t x = (word & 0xfffu) | (word & 0xfff000u) << 4;
  return (x & 0x003f003fu) | (x & 0x0fc00fc0u) << 2;
}

constexpr uint32_t gather_6bit(uint32_t bytes) {
  const uint32_t x = (bytes & 0x003f003fu) | (bytes >> 2 & 0x0fc00fc0u);
  return (x & 0xfffu) | (x >> 4 & 0xfff000u);
}

}  // namespace thriftattn

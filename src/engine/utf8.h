// UTF-8 as the tokenizers need it: where characters end, tolerant of anything that is not UTF-8.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace thriftattn {

// Bytes of the well-formed UTF-8 character at text[at], or 0 if there is none: a stray continuation
// byte, an overlong form, a surrogate, a value above U+10FFFF or a character cut short.
inline size_t utf8_char_bytes(std::string_view text, size_t at) {
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(text[at + i]); };
  const size_t left = text.size() - at;
  const unsigned char b0 = byte(0);
  if (b0 < 0x80) return 1;
  if (b0 < 0xC2 || b0 > 0xF4) return 0;
  const size_t n = b0 < 0xE0 ? 2 : b0 < 0xF0 ? 3 : 4;
  if (left < n) return 0;
  // The second byte's range excludes overlong forms, surrogates and values that are too large.
  const unsigned char low = b0 == 0xE0 ? 0xA0 : b0 == 0xF0 ? 0x90 : 0x80;
  const unsigned char high = b0 == 0xED ? 0x9F : b0 == 0xF4 ? 0x8F : 0xBF;
  if (byte(1) < low || byte(1) > high) return 0;
  for (size_t i = 2; i < n; ++i) {
    if ((byte(i) & 0xC0) != 0x80) return 0;
  }
  return n;
}

// The code point of a character of n bytes that utf8_char_bytes accepted.
inline uint32_t utf8_decode(std::string_view text, size_t at, size_t n) {
  const auto byte = [&](size_t i) {
    return static_cast<uint32_t>(static_cast<unsigned char>(text[at + i]));
  };
  if (n == 1) return byte(0);
  uint32_t c = byte(0) & (0x7Fu >> n);
  for (size_t i = 1; i < n; ++i) c = c << 6 | (byte(i) & 0x3F);
  return c;
}

inline void utf8_append(std::string& out, uint32_t c) {
  const auto put = [&](uint32_t b) { out += static_cast<char>(static_cast<unsigned char>(b)); };
  if (c < 0x80) {
    put(c);
  } else if (c < 0x800) {
    put(0xC0 | c >> 6);
    put(0x80 | (c & 0x3F));
  } else if (c < 0x10000) {
    put(0xE0 | c >> 12);
    put(0x80 | (c >> 6 & 0x3F));
    put(0x80 | (c & 0x3F));
  } else {
    put(0xF0 | c >> 18);
    put(0x80 | (c >> 12 & 0x3F));
    put(0x80 | (c >> 6 & 0x3F));
    put(0x80 | (c & 0x3F));
  }
}

}  // namespace thriftattn

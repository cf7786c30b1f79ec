// The GGUF reader: sound files give what was written; every kind of broken file gives one line.
#include "engine/gguf.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <functional>
#include <limits>
#include <random>

#include "gguf_writer.h"

namespace thriftattn {
namespace {

using test::as_bytes;
using test::GgufWriter;
using testing::HasSubstr;

GgufWriter sound() {
  GgufWriter w;
  w.string("general.architecture", "qwen2").u32("qwen2.block_count", 28);
  w.u8("u8", 255).i8("i8", -128).u16("u16", 65535).i16("i16", -32768).i32("i32", -7);
  w.f32("f32", 1.5f).boolean("yes", true).boolean("no", false);
  w.u64("u64", std::numeric_limits<uint64_t>::max()).i64("i64", -1).f64("f64", 0.1);
  w.strings("strings", {"a", "", "ccc"}).i32s("i32s", {1, -2, 3}).f32s("f32s", {0.5f, -2.0f});
  w.u8s("bools", 7, {1, 0, 1}).strings("none", {});
  w.f32_tensor("first", {3, 2}, {1, 2, 3, 4, 5, 6}).f32_tensor("second", {1}, {-1});
  return w;
}

// What opening the bytes says; empty if nothing.
std::string message_of(const std::string& bytes, ErrorCode* code = nullptr) {
  try {
    GgufFile::from_memory(as_bytes(bytes), "bad.gguf");
    return "";
  } catch (const Error& e) {
    if (code != nullptr) *code = e.code();
    return e.what();
  }
}

TEST(Gguf, ReadsWhatWasWritten) {
  const std::string bytes = sound().build();
  const GgufFile f = GgufFile::from_memory(as_bytes(bytes), "x");
  EXPECT_EQ(f.version(), 3u);
  EXPECT_EQ(f.architecture(), "qwen2");
  EXPECT_EQ(f.get_u64(f.arch_key("%s.block_count")), 28u);
  EXPECT_EQ(f.get_u64("u8"), 255u);
  EXPECT_EQ(f.get_i64("i8"), -128);
  EXPECT_EQ(f.get_u64("u16"), 65535u);
  EXPECT_EQ(f.get_i64("i16"), -32768);
  EXPECT_EQ(f.get_i64("i32"), -7);
  EXPECT_EQ(f.get_f64("f32"), 1.5);
  EXPECT_EQ(f.get_f64("i32"), -7.0);
  EXPECT_EQ(f.get_f64("f64"), 0.1);
  EXPECT_TRUE(f.get_bool("yes"));
  EXPECT_FALSE(f.get_bool("no"));
  EXPECT_EQ(f.get_u64("u64"), std::numeric_limits<uint64_t>::max());
  EXPECT_EQ(f.get_i64("i64"), -1);
  EXPECT_THAT(f.get_string_array("strings"), testing::ElementsAre("a", "", "ccc"));
  EXPECT_THAT(f.get_string_array("none"), testing::IsEmpty());
  EXPECT_THAT(f.get_i64_array("i32s"), testing::ElementsAre(1, -2, 3));
  EXPECT_THAT(f.get_i64_array("bools"), testing::ElementsAre(1, 0, 1));
  EXPECT_THAT(f.get_f64_array("f32s"), testing::ElementsAre(0.5, -2.0));
  EXPECT_THAT(f.get_f64_array("i32s"), testing::ElementsAre(1, -2, 3));
  EXPECT_TRUE(f.is_array("i32s"));
  EXPECT_FALSE(f.is_array("i32"));
  EXPECT_EQ(f.find_u64("absent"), std::nullopt);
  EXPECT_EQ(f.find_string_array("absent"), std::nullopt);

  ASSERT_EQ(f.tensors().size(), 2u);
  const GgufTensor& t = f.require("first");
  EXPECT_EQ(t.ne[0], 3);
  EXPECT_EQ(t.ne[1], 2);
  EXPECT_EQ(t.n_dims, 2);
  EXPECT_EQ(t.rows(), 2);
  EXPECT_EQ(t.shape(), "3 x 2");
  std::vector<float> row(3);
  dequantize_rows(t, 1, 1, row.data());
  EXPECT_THAT(row, testing::ElementsAre(4, 5, 6));
  dequantize_rows(*f.find("second"), 0, 1, row.data());
  EXPECT_EQ(row[0], -1);
  EXPECT_EQ(f.find("third"), nullptr);
}

TEST(Gguf, ReadsVersion2AndOtherAlignments) {
  GgufWriter w = sound();
  w.version = 2;
  w.alignment = 128;
  w.u32("general.alignment", 128);
  const std::string bytes = w.build();
  const GgufFile f = GgufFile::from_memory(as_bytes(bytes), "x");
  float x;
  dequantize_rows(f.require("second"), 0, 1, &x);
  EXPECT_EQ(x, -1);
}

TEST(Gguf, StaysValidWhenMoved) {
  const std::string bytes = sound().build();
  GgufFile a = GgufFile::from_memory(as_bytes(bytes), "x");
  const GgufFile b = std::move(a);
  EXPECT_EQ(b.require("first").ne[0], 3);
  EXPECT_EQ(b.architecture(), "qwen2");
}

TEST(Gguf, WrongTypesAndMissingKeysSayWhich) {
  const std::string bytes = sound().build();
  const GgufFile f = GgufFile::from_memory(as_bytes(bytes), "x.gguf");
  const auto says = [&](const std::function<void()>& fn) -> std::string {
    try {
      fn();
    } catch (const Error& e) {
      return e.what();
    }
    return "";
  };
  EXPECT_THAT(says([&] { f.get_u64("absent"); }), HasSubstr("no metadata key 'absent'"));
  EXPECT_THAT(says([&] { f.get_u64("i64"); }), HasSubstr("not negative"));
  EXPECT_THAT(says([&] { f.get_i64("u64"); }), HasSubstr("whole number"));
  EXPECT_THAT(says([&] { f.get_u64("f32"); }), HasSubstr("holds f32"));
  EXPECT_THAT(says([&] { f.get_u64("yes"); }), HasSubstr("holds bool"));
  EXPECT_THAT(says([&] { f.get_string("f32"); }), HasSubstr("a string"));
  EXPECT_THAT(says([&] { f.get_bool("u8"); }), HasSubstr("a bool"));
  EXPECT_THAT(says([&] { f.get_f64("strings"); }), HasSubstr("an array of string"));
  EXPECT_THAT(says([&] { f.get_i64_array("f32s"); }), HasSubstr("whole numbers"));
  EXPECT_THAT(says([&] { f.get_i64_array("i32"); }), HasSubstr("array"));
  EXPECT_THAT(says([&] { f.get_string_array("i32s"); }), HasSubstr("array of strings"));
  EXPECT_THAT(says([&] { f.require("nope"); }), HasSubstr("no tensor 'nope'"));
}

struct Broken {
  const char* what;
  std::function<std::string()> bytes;
  ErrorCode code;
  const char* says;
};

std::string changed(const std::function<void(GgufWriter&)>& change) {
  GgufWriter w = sound();
  change(w);
  return w.build();
}

TEST(Gguf, BrokenFilesGiveOneLine) {
  constexpr auto corrupt = ErrorCode::corrupt;
  const std::string huge(8, '\xff');
  const std::vector<Broken> cases = {
      {"empty", [] { return std::string(); }, corrupt, "empty"},
      {"magic", [] { return std::string("GGML0000"); }, corrupt, "does not start with 'GGUF'"},
      {"only magic", [] { return std::string("GGUF"); }, corrupt, "the version"},
      {"version 1", [] { return changed([](auto& w) { w.version = 1; }); }, ErrorCode::unsupported,
       "version 1"},
      {"version 4", [] { return changed([](auto& w) { w.version = 4; }); }, ErrorCode::unsupported,
       "version 4"},
      {"big-endian", [] { return changed([](auto& w) { w.version = 3u << 24; }); },
       ErrorCode::unsupported, "big-endian"},
      {"key count", [] { return changed([](auto& w) { w.extra_keys = INT64_MAX - 100; }); },
       corrupt, "keys"},
      {"tensor count", [] { return changed([](auto& w) { w.extra_tensors = -3; }); }, corrupt,
       "tensors"},
      {"one tensor too many", [] { return changed([](auto& w) { w.extra_tensors = 1; }); }, corrupt,
       ""},
      {"many keys",
       [] {
         GgufWriter w;
         for (int i = 0; i < 70000; ++i) w.u8(std::to_string(i), 0);
         return w.build();
       },
       corrupt, "the limit is 65536"},
      {"huge string", [&] { return changed([&](auto& w) { w.raw("s", 8, huge); }); }, corrupt,
       "a string"},
      {"huge array",
       [&] { return changed([&](auto& w) { w.raw("a", 9, std::string("\4\0\0\0", 4) + huge); }); },
       corrupt, "values in an array"},
      {"huge array that wraps",
       [&] {
         return changed([&](auto& w) {
           w.raw("a", 9, std::string("\xc\0\0\0", 4) + std::string("\1\0\0\0\0\0\0\x20", 8));
         });
       },
       corrupt, "values in an array"},
      {"huge string array",
       [&] { return changed([&](auto& w) { w.raw("a", 9, std::string("\x8\0\0\0", 4) + huge); }); },
       corrupt, "strings"},
      {"nested array",
       [] {
         return changed([](auto& w) {
           w.raw("a", 9, std::string("\x9\0\0\0", 4) + std::string("\1\0\0\0\0\0\0\0", 8));
         });
       },
       corrupt, "type number 9"},
      {"value type", [] { return changed([](auto& w) { w.raw("v", 13, "x"); }); }, corrupt,
       "type number 13"},
      {"boolean", [] { return changed([](auto& w) { w.raw("v", 7, "\2"); }); }, corrupt,
       "neither 0 nor 1"},
      {"duplicate key", [] { return changed([](auto& w) { w.u8("u8", 1); }); }, corrupt,
       "key 'u8' twice"},
      {"empty key", [] { return changed([](auto& w) { w.u8("", 1); }); }, corrupt, "empty key"},
      {"alignment 0", [] { return changed([](auto& w) { w.u32("general.alignment", 0); }); },
       corrupt, "general.alignment is 0"},
      {"alignment 24", [] { return changed([](auto& w) { w.u32("general.alignment", 24); }); },
       corrupt, "general.alignment is 24"},
      {"alignment 2^40",
       [] { return changed([](auto& w) { w.u64("general.alignment", uint64_t{1} << 40); }); },
       corrupt, "general.alignment"},
      {"alignment string",
       [] { return changed([](auto& w) { w.string("general.alignment", "32"); }); }, corrupt,
       "holds string"},
      {"duplicate tensor", [] { return changed([](auto& w) { w.f32_tensor("first", {1}, {0}); }); },
       corrupt, "'first' twice"},
      {"unnamed tensor", [] { return changed([](auto& w) { w.f32_tensor("", {1}, {0}); }); },
       corrupt, "without a name"},
      {"no dimensions", [] { return changed([](auto& w) { w.f32_tensor("t", {}, {0}); }); },
       corrupt, "0 dimensions"},
      {"five dimensions",
       [] { return changed([](auto& w) {
              w.f32_tensor("t", {1, 1, 1, 1, 1}, {0});
            }); }, corrupt,
       "5 dimensions"},
      {"dimension 0", [] { return changed([](auto& w) { w.f32_tensor("t", {0}, {}); }); }, corrupt,
       "dimension 0"},
      {"product wraps",
       [] {
         return changed([](auto& w) {
           w.f32_tensor("t", {uint64_t{1} << 32, uint64_t{1} << 32}, {0});
         });
       },
       corrupt, "impossible dimension"},
      {"product wraps to 4",
       [] {
         return changed([](auto& w) {
           w.f32_tensor("t", {(uint64_t{1} << 63) + 2, 2}, {0, 0, 0, 0});
         });
       },
       corrupt, "impossible dimension"},
      {"known type that is not read",
       [] { return changed([](auto& w) {
              w.tensor({"t", 10, {256}, std::string(84, 0)});
            }); },
       ErrorCode::unsupported, "Q2_K"},
      {"unknown type",
       [] { return changed([](auto& w) {
              w.tensor({"t", 12345, {256}, std::string(84, 0)});
            }); },
       ErrorCode::unsupported, "type 12345"},
      {"half a block",
       [] { return changed([](auto& w) {
              w.tensor({"t", 8, {33}, std::string(68, 0)});
            }); },
       corrupt, "multiple of 32"},
      {"data missing", [] { return changed([](auto& w) { w.f32_tensor("t", {1000}, {0}); }); },
       corrupt, "the file holds"},
      {"offset outside",
       [] { return changed([](auto& w) {
              w.tensor({"t", 0, {1}, "abcd", int64_t{1} << 40});
            }); },
       corrupt, "the file holds"},
      {"offset that wraps",
       [] {
         return changed([](auto& w) { w.tensor({"t", 0, {8}, std::string(32, 0), -64 - 32}); });
       },
       corrupt, "the file holds"},
      {"offset not aligned",
       [] { return changed([](auto& w) {
              w.tensor({"t", 0, {1}, "abcd", -8});
            }); }, corrupt,
       "alignment 32"},
      {"overlap", [] { return changed([](auto& w) {
                         w.tensor({"t", 0, {1}, "abcd", -32});
                       }); },
       corrupt, "overlap"},
  };
  for (const Broken& c : cases) {
    ErrorCode code{};
    const std::string message = message_of(c.bytes(), &code);
    EXPECT_THAT(message, testing::StartsWith("bad.gguf: ")) << c.what;
    EXPECT_THAT(message, HasSubstr(c.says)) << c.what;
    EXPECT_THAT(message, HasSubstr("; ")) << c.what << ": no remedy";
    EXPECT_THAT(message, testing::Not(HasSubstr("\n"))) << c.what;
    EXPECT_EQ(code, c.code) << c.what << ": " << message;
  }
}

// The alignment of 32 pads the file; every cut before the last tensor's end must be noticed.
TEST(Gguf, EveryTruncationIsNoticed) {
  const std::string bytes = sound().build();
  for (size_t n = 0; n < bytes.size(); ++n) {
    const std::string cut = bytes.substr(0, n);  // a copy, so that reading past it is a bug
    ASSERT_NE(message_of(cut), "") << n;
  }
  EXPECT_EQ(message_of(bytes), "");
}

TEST(Gguf, RandomDamageNeverCrashes) {
  const std::string bytes = sound().build();
  std::mt19937 random(1);
  for (int i = 0; i < 20000; ++i) {
    std::string damaged = bytes;
    for (unsigned k = 0; k <= random() % 3; ++k) {
      damaged[random() % damaged.size()] = static_cast<char>(random());
    }
    const std::string message = message_of(damaged);
    ASSERT_EQ(message.find('\n'), std::string::npos);
    ASSERT_LT(message.size(), 2000u);
  }
}

TEST(Gguf, NamesInMessagesArePrintable) {
  const std::string bytes = changed([](auto& w) {
    w.tensor({"a\n\x1b[31m" + std::string(500, 'x'), 10, {256}, "d"});
  });
  const std::string message = message_of(bytes);
  EXPECT_THAT(message, HasSubstr("a\\x0a\\x1b[31mxxx"));
  EXPECT_LT(message.size(), 400u);
}

TEST(Gguf, NonFiniteMetadataIsRefused) {
  GgufWriter w = sound();
  w.f32("rope", std::numeric_limits<float>::quiet_NaN());
  const std::string bytes = w.build();
  const GgufFile f = GgufFile::from_memory(as_bytes(bytes), "x");
  EXPECT_THROW(f.get_f64("rope"), Error);
}

class GgufOnDisk : public testing::Test {
 protected:
  void SetUp() override {
    dir_ = std::filesystem::temp_directory_path() /
           ("thriftattn_gguf_" + std::to_string(std::random_device()()));
    std::filesystem::create_directory(dir_);
  }
  void TearDown() override { std::filesystem::remove_all(dir_); }
  std::string write(const std::string& bytes) {
    const auto path = dir_ / "m.gguf";
    std::ofstream(path, std::ios::binary) << bytes;
    return path.string();
  }
  std::string message(const std::string& path, ErrorCode code) {
    try {
      GgufFile::open(path);
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), code) << e.what();
      return e.what();
    }
    return "";
  }
  std::filesystem::path dir_;
};

TEST_F(GgufOnDisk, OpensAndHashes) {
  const std::string bytes = sound().build();
  const GgufFile f = GgufFile::open(write(bytes));
  EXPECT_EQ(f.architecture(), "qwen2");
  EXPECT_EQ(f.content_hash(), GgufFile::from_memory(as_bytes(bytes), "x").content_hash());
  EXPECT_EQ(f.content_hash().size(), 32u);
  std::string other = bytes;
  other.back() ^= 1;
  EXPECT_NE(f.content_hash(), GgufFile::from_memory(as_bytes(other), "x").content_hash());
}

TEST_F(GgufOnDisk, HashIsXxh3) {
  // xxh128sum of the 24 bytes of a file without keys and tensors.
  const std::string bytes = GgufWriter().build();
  EXPECT_EQ(GgufFile::from_memory(as_bytes(bytes), "x").content_hash(),
            "fd59a5f5077d3594b2b224ba64cc5c3d");
}

TEST_F(GgufOnDisk, MissingEmptyAndOddFiles) {
  EXPECT_THAT(message((dir_ / "none.gguf").string(), ErrorCode::not_found),
              HasSubstr("no such file"));
  EXPECT_THAT(message(dir_.string(), ErrorCode::io), HasSubstr("not a regular file"));
  EXPECT_THAT(message(write(""), ErrorCode::corrupt), HasSubstr("the file is empty"));
  EXPECT_THAT(message("/dev/null", ErrorCode::io), HasSubstr("not a regular file"));
}

}  // namespace
}  // namespace thriftattn

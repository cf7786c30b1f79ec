// Tokenizers: small vocabularies against the definition of their algorithm, words and real models
// against goldens of other implementations (the "source" field of each file in data/ says which).
#include "engine/tokenizer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <functional>
#include <limits>
#include <nlohmann/json.hpp>
#include <random>

#include "engine/bpe.h"
#include "engine/pretokenize.h"
#include "engine/utf8.h"
#include "thriftattn/error.h"
#include "tokenizer_files.h"

namespace thriftattn {
namespace {

using test::as_bytes;
using test::BpeVocabulary;
using test::GgufWriter;
using test::SpmVocabulary;
using testing::ElementsAre;
using testing::HasSubstr;
using Ids = std::vector<int32_t>;
using Json = nlohmann::json;

const std::string kSpace = "\xE2\x96\x81";
const std::filesystem::path kSource = THRIFTATTN_SOURCE_DIR;

Json read_json(const std::filesystem::path& path) { return Json::parse(std::ifstream(path)); }

Tokenizer make(const GgufWriter& writer) {
  const std::string bytes = writer.build();
  return Tokenizer::from_gguf(GgufFile::from_memory(as_bytes(bytes), "t.gguf"));
}

// ---- words

TEST(PreTokenizer, WordsMatchTheOriginalRegexEngine) {
  const Json golden = read_json(kSource / "tests/engine/data/pretokenize_goldens.json");
  int compared = 0;
  for (const auto& [name, words] : golden.at("words").items()) {
    const PreTokenizer pre(name);
    for (size_t i = 0; i < words.size(); ++i) {
      const std::string text = golden.at("texts").at(i);
      const auto got = pre.split(text);
      EXPECT_EQ(std::vector<std::string>(got.begin(), got.end()),
                words[i].get<std::vector<std::string>>())
          << name << ": " << golden.at("texts").at(i).dump();
      ++compared;
    }
  }
  EXPECT_GT(compared, 200);
}

TEST(PreTokenizer, FamiliesDiffer) {
  const auto words = [](const char* name, std::string_view text) {
    const auto w = PreTokenizer(name).split(text);
    return std::vector<std::string>(w.begin(), w.end());
  };
  EXPECT_THAT(words("qwen2", "12345"), ElementsAre("1", "2", "3", "4", "5"));
  EXPECT_THAT(words("llama-bpe", "12345"), ElementsAre("123", "45"));
  EXPECT_THAT(words("gpt-2", "12345"), ElementsAre("12345"));
  EXPECT_THAT(words("gpt-2", "I'LL"), ElementsAre("I", "'", "LL"));
  EXPECT_THAT(words("qwen2", "I'LL"), ElementsAre("I", "'LL"));
}

TEST(PreTokenizer, LosesNothing) {
  std::mt19937 random(3);
  for (const char* name : {"gpt-2", "llama-bpe", "qwen2"}) {
    const PreTokenizer pre(name);
    for (int round = 0; round < 500; ++round) {
      std::string text;
      for (unsigned i = 0; i < random() % 60; ++i) {
        const char* pieces[] = {" ",        "\n",   "\r",       "a",
                                "B",        "'s",   "7",        "-",
                                "\xC3\xA9", "\xFF", "\xE4\xBD", "\xF0\x9F\x98\x80",
                                "\xC2\xA0", "\x80"};
        text += pieces[random() % std::size(pieces)];
      }
      std::string joined;
      for (const auto word : pre.split(text)) {
        EXPECT_FALSE(word.empty());
        joined += word;
      }
      ASSERT_EQ(joined, text);
    }
  }
}

TEST(PreTokenizer, UnknownNamesAreRefused) {
  try {
    PreTokenizer pre("tekken");
    FAIL();
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ErrorCode::unsupported);
    EXPECT_THAT(e.what(), HasSubstr("'tekken'"));
    EXPECT_THAT(e.what(), HasSubstr("qwen2"));
  }
}

TEST(Utf8, AcceptsExactlyWellFormedCharacters) {
  const auto n = [](std::string_view s) { return utf8_char_bytes(s, 0); };
  EXPECT_EQ(n("a"), 1u);
  EXPECT_EQ(n("\xC2\x80"), 2u);
  EXPECT_EQ(n("\xE0\xA0\x80"), 3u);
  EXPECT_EQ(n("\xED\x9F\xBF"), 3u);
  EXPECT_EQ(n("\xF4\x8F\xBF\xBF"), 4u);
  for (const char* bad :
       {"\x80", "\xC1\xBF", "\xC2", "\xC2\x41", "\xE0\x9F\xBF", "\xED\xA0\x80", "\xE4\xBD",
        "\xF0\x8F\xBF\xBF", "\xF4\x90\x80\x80", "\xF5\x80\x80\x80", "\xF0\x9F\x98", "\xFF"}) {
    EXPECT_EQ(n(bad), 0u) << testing::PrintToString(std::string(bad));
  }
  for (const uint32_t c : {0x24u, 0x7FFu, 0x800u, 0xFFFDu, 0x10000u, 0x10FFFFu}) {
    std::string s;
    utf8_append(s, c);
    EXPECT_EQ(n(s), s.size());
    EXPECT_EQ(utf8_decode(s, 0, s.size()), c);
  }
}

// ---- byte-level BPE

BpeVocabulary random_vocabulary(std::mt19937& random, int merges) {
  BpeVocabulary v;
  std::vector<int32_t> pool = {'a', 'b', 'c'};
  for (int i = 0; i < merges; ++i) {
    const int32_t id = v.merge(pool[random() % pool.size()], pool[random() % pool.size()]);
    pool.push_back(id);
  }
  return v;
}

// Short words go through the scan, long ones through the heap; both must equal the definition.
TEST(Bpe, EqualsItsDefinition) {
  std::mt19937 random(5);
  for (int round = 0; round < 60; ++round) {
    const BpeVocabulary v = random_vocabulary(random, 30);
    const Tokenizer t = make(v.file());
    for (const size_t length : {1u, 2u, 5u, 23u, 24u, 25u, 26u, 60u, 200u}) {
      std::string word;
      for (size_t i = 0; i < length; ++i) word += static_cast<char>('a' + random() % 3);
      ASSERT_EQ(t.encode(word), v.slow_encode_word(word)) << word;
      ASSERT_EQ(t.decode(t.encode(word)), word);
    }
  }
}

TEST(Bpe, ByteAlphabet) {
  for (int b = 0; b < 256; ++b) {
    EXPECT_EQ(decode_byte_alphabet(test::visible_byte(b)), std::string(1, static_cast<char>(b)));
  }
  EXPECT_EQ(decode_byte_alphabet("\xC4\xA0the"), " the");
  EXPECT_EQ(decode_byte_alphabet("\xE4\xBD\xA0"), "\xE4\xBD\xA0");
}

TEST(Bpe, MergesOnlyInsideWords) {
  BpeVocabulary v;
  const int32_t ab = v.merge('a', 'b');
  const int32_t space_ab = v.merge(' ', ab);
  v.merge('b', ' ');
  const Tokenizer t = make(v.file());
  EXPECT_EQ(t.encode("ab ab"), (Ids{ab, space_ab}));
  EXPECT_EQ(t.token_bytes(space_ab), " ab");
  EXPECT_EQ(t.token_text(space_ab),
            "\xC4\xA0"
            "ab");
}

TEST(Bpe, BytesThatAreNotUtf8ComeBack) {
  BpeVocabulary v;
  v.merge(0xFF, 0xFE);
  v.merge(0xE4, 0xBD);
  const Tokenizer t = make(v.file());
  std::mt19937 random(6);
  for (int round = 0; round < 300; ++round) {
    std::string text;
    for (unsigned i = 0; i < random() % 50; ++i) text += static_cast<char>(random());
    ASSERT_EQ(t.decode(t.encode(text)), text);
  }
  // Defined as bytes: no merge reaches across them.
  EXPECT_EQ(t.encode("\xFF\xFE"), (Ids{0xFF, 0xFE}));
}

TEST(Bpe, Llama3TakesWholeWordsFirst) {
  BpeVocabulary v;
  v.merge('b', 'c');
  const int32_t abc = v.special("abc", 1);  // a token that no merge reaches
  EXPECT_EQ(make(v.file("qwen2")).encode("abc").size(), 2u);
  const std::string bytes = v.file("llama-bpe").u32("tokenizer.ggml.bos_token_id", 0).build();
  const Tokenizer t = Tokenizer::from_gguf(GgufFile::from_memory(as_bytes(bytes), "x"));
  EXPECT_EQ(t.encode("abc"), (Ids{abc}));
}

TEST(Bpe, Llama3AddsBosUnlessToldOtherwise) {
  const BpeVocabulary v;
  GgufWriter w = v.file("llama-bpe");
  w.erase("tokenizer.ggml.add_bos_token").u32("tokenizer.ggml.bos_token_id", 7);
  const Tokenizer t = make(w);
  EXPECT_TRUE(t.adds_bos());
  EXPECT_EQ(t.encode("x"), (Ids{7, 'x'}));
  EXPECT_EQ(t.encode("x", {.add_bos = false}), (Ids{'x'}));
  EXPECT_FALSE(make(v.file("llama-bpe").u32("tokenizer.ggml.bos_token_id", 7)).adds_bos());
}

TEST(Bpe, SpecialTokensOnlyWhenAsked) {
  BpeVocabulary v;
  const int32_t end = v.special("<|im_end|>", 3);
  const int32_t longer = v.special("<|im_end|>>", 3);
  const int32_t call = v.special("<tool_call>", 4);
  const Tokenizer t = make(v.file());
  const std::string text = "a<|im_end|>b<tool_call>";
  const Ids with = t.encode(text, {.parse_special = true});
  EXPECT_EQ(with, (Ids{'a', end, 'b', call}));
  // User-defined tokens are part of the vocabulary; control tokens in a document are just text.
  const Ids without = t.encode(text);
  EXPECT_THAT(without, testing::Not(testing::Contains(end)));
  EXPECT_EQ(without.back(), call);
  EXPECT_EQ(t.decode(without), text);
  EXPECT_EQ(t.decode(with), "ab<tool_call>");
  // Leftmost, then longest.
  EXPECT_EQ(t.encode("<|im_end|>>", {.parse_special = true}), (Ids{longer}));
  EXPECT_EQ(t.encode("<|im_end|", {.parse_special = true}).size(), 9u);
  EXPECT_EQ(t.encode("<|<|im_end|>", {.parse_special = true}), (Ids{'<', '|', end}));
  EXPECT_EQ(t.find_token("<|im_end|>"), end);
  EXPECT_TRUE(t.is_control(end));
  EXPECT_TRUE(t.is_end_of_generation(end));
  EXPECT_EQ(t.eot(), end);
  EXPECT_FALSE(t.is_end_of_generation('a'));
}

TEST(Bpe, MergesCannotFormControlTokens) {
  BpeVocabulary v;
  v.special("xy", 3);
  v.merge('x', 'y');
  EXPECT_THROW(make(v.file()), Error);
}

// ---- SentencePiece

TEST(Spm, EqualsItsDefinition) {
  std::mt19937 random(8);
  for (int round = 0; round < 60; ++round) {
    SpmVocabulary v;
    std::vector<std::string> pool = {"a", "b", kSpace};
    for (const auto& s : pool) v.piece(s, -1000);
    for (int i = 0; i < 40; ++i) {
      const std::string joined = pool[random() % pool.size()] + pool[random() % pool.size()];
      if (v.pieces.contains(joined)) continue;
      // Few distinct scores, so that ties (leftmost first) happen.
      v.piece(joined, -static_cast<float>(random() % 20));
      pool.push_back(joined);
    }
    const Tokenizer t = make(v.file(false));
    for (const size_t length : {1u, 2u, 7u, 40u, 150u}) {
      std::string text;
      std::vector<std::string> characters;
      for (size_t i = 0; i < length; ++i) {
        const char c = "ab z"[random() % 4];
        text += c;
        characters.push_back(c == ' ' ? kSpace : std::string(1, c));
      }
      ASSERT_EQ(t.encode(text, {.add_bos = false}), v.slow_encode(characters)) << text;
      ASSERT_EQ(t.decode(t.encode(text)), text);
    }
  }
}

TEST(Spm, SpacePrefixAndBos) {
  SpmVocabulary v;
  const int32_t hi = v.piece("hi", -1), space_hi = v.piece(kSpace + "hi", -2);
  v.piece("h", -10);
  v.piece("i", -11);
  v.piece(kSpace, -12);
  const Tokenizer with = make(v.file(true)), without = make(v.file(false));
  EXPECT_EQ(with.encode("hi"), (Ids{1, space_hi}));
  EXPECT_EQ(without.encode("hi"), (Ids{1, hi}));
  EXPECT_EQ(with.decode(with.encode("hi")), "hi");
  EXPECT_EQ(with.decode(with.encode(" hi")), " hi");
  EXPECT_EQ(without.decode(without.encode(" hi")), " hi");
  EXPECT_EQ(with.encode("</s>hi", {.parse_special = true}), (Ids{1, 2, space_hi}));
  EXPECT_EQ(with.token_bytes(space_hi), " hi");
  EXPECT_EQ(with.encode(""), (Ids{1}));
}

TEST(Spm, ByteFallback) {
  SpmVocabulary v;
  v.piece("a", -1);
  v.piece(kSpace, -2);  // without it, a space would come back as the bytes of U+2581
  const Tokenizer t = make(v.file(false));
  EXPECT_EQ(t.encode("a\xC3\xA9", {.add_bos = false}),
            (Ids{t.find_token("a").value(), 3 + 0xC3, 3 + 0xA9}));
  EXPECT_EQ(t.token_bytes(3 + 0xC3), "\xC3");
  std::mt19937 random(9);
  for (int round = 0; round < 300; ++round) {
    std::string text;
    for (unsigned i = 0; i < random() % 50; ++i) text += static_cast<char>(random());
    ASSERT_EQ(t.decode(t.encode(text)), text);
  }
}

TEST(Spm, UnknownTokenWhereBytesAreMissing) {
  SpmVocabulary v;
  v.piece("a", -1);
  for (auto& type : v.types) type = type == 6 ? 5 : type;  // no byte tokens any more
  EXPECT_EQ(make(v.file(false)).encode("az", {.add_bos = false}).back(), 0);
}

TEST(Spm, UserDefinedTokensAreNotSplitOrMerged) {
  SpmVocabulary v;
  v.piece("a", -5);
  v.piece(kSpace, -6);
  const int32_t breaks = v.add("\n\n", 4, 0);
  const int32_t spaces = v.add(kSpace + kSpace, 4, 0);  // written either way by converters
  v.piece(kSpace + "a", -1);
  const Tokenizer t = make(v.file(false));
  const int32_t a = t.find_token("a").value();
  EXPECT_EQ(t.encode("a\n\na", {.add_bos = false}), (Ids{a, breaks, a}));
  EXPECT_EQ(t.encode("a  a", {.add_bos = false}), (Ids{a, spaces, a}));
  EXPECT_EQ(t.decode(t.encode("a  a")), "a  a");
}

// ---- long texts

double seconds_of(const std::function<void()>& fn) {
  const auto begin = std::chrono::steady_clock::now();
  fn();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

// A quarter of a megabyte that is one word (or one text) takes minutes in quadratic time.
TEST(Tokenizers, LongRunsTakeNoQuadraticTime) {
  BpeVocabulary b;
  SpmVocabulary s;
  for (const char c : std::string("a -=\n")) {
    int32_t id = static_cast<unsigned char>(c);
    for (int i = 0; i < 5; ++i) id = b.merge(id, id);
    std::string piece = c == ' ' ? kSpace : std::string(1, c);
    for (int i = 0; i < 5; ++i, piece += piece) s.piece(piece, -static_cast<float>(i));
  }
  const Tokenizer bpe = make(b.file()), spm = make(s.file(false));
  for (const char c : std::string("a -=\n\xFF")) {
    const std::string text(1 << 18, c);
    for (const Tokenizer* t : {&bpe, &spm}) {
      Ids ids;
      EXPECT_LT(seconds_of([&] { ids = t->encode(text, {.add_bos = false}); }), 20.0);
      EXPECT_EQ(t->decode(ids), text);
      if (c != '\xFF') {
        EXPECT_LE(ids.size(), text.size() / 8);
      }
    }
  }
}

// ---- damaged vocabularies

TEST(Tokenizers, DamagedVocabulariesGiveOneLine) {
  BpeVocabulary b;
  b.merge('a', 'b');
  SpmVocabulary s;
  s.piece("a", -1);
  using Change = std::function<void(GgufWriter&)>;
  const auto bpe = [&](const Change& c) {
    GgufWriter w = b.file();
    c(w);
    return w;
  };
  const auto spm = [&](const Change& c) {
    GgufWriter w = s.file(false);
    c(w);
    return w;
  };
  constexpr const char* kTokens = "tokenizer.ggml.tokens";
  constexpr const char* kTypes = "tokenizer.ggml.token_type";
  constexpr const char* kScores = "tokenizer.ggml.scores";
  constexpr const char* kMerges = "tokenizer.ggml.merges";
  constexpr const char* kPre = "tokenizer.ggml.pre";
  std::vector<float> nan(s.scores.size(), 0.0f);
  nan[5] = std::numeric_limits<float>::quiet_NaN();
  std::vector<int32_t> wrong_type(b.types.size(), 1);
  wrong_type[9] = 7;
  std::vector<std::string> gap = b.tokens;
  gap[200] = "gap";
  const std::vector<std::pair<GgufWriter, const char*>> cases = {
      {bpe([](auto& w) { w.erase("tokenizer.ggml.model"); }), "tokenizer.ggml.model"},
      {bpe([](auto& w) { w.erase("tokenizer.ggml.model").string("tokenizer.ggml.model", "t5"); }),
       "kind 't5'"},
      {bpe([&](auto& w) { w.erase(kTokens); }), "tokenizer.ggml.tokens"},
      {bpe([&](auto& w) { w.erase(kTokens).strings(kTokens, {}); }), "0 tokens"},
      {bpe([&](auto& w) { w.erase(kTokens).i32s(kTokens, {1}); }), "array of i32"},
      {bpe([&](auto& w) { w.erase(kTypes).i32s(kTypes, {1}); }), "1 token types"},
      {bpe([&](auto& w) { w.erase(kTypes).i32s(kTypes, wrong_type); }), "unknown type 7"},
      {bpe([&](auto& w) { w.erase(kPre); }), "does not say its pre-tokenizer"},
      {bpe([&](auto& w) { w.erase(kPre).string(kPre, "tekken"); }), "'tekken'"},
      {bpe([&](auto& w) { w.erase(kMerges); }), "tokenizer.ggml.merges"},
      {bpe([&](auto& w) { w.erase(kMerges).strings(kMerges, {"ab"}); }), "merge 0 'ab'"},
      {bpe([&](auto& w) {
         w.erase(kMerges).strings(kMerges, {"a b", "a zz"});
       }),
       "merge 1 'a zz'"},
      {bpe([&](auto& w) { w.erase(kMerges).strings(kMerges, {"b a"}); }), "form a third"},
      {bpe([&](auto& w) { w.erase(kTokens).strings(kTokens, gap); }), "no token for byte 200"},
      {bpe([](auto& w) { w.u32("tokenizer.ggml.eos_token_id", 9999); }), "is 9999, outside"},
      {bpe([](auto& w) {
         w.erase("tokenizer.ggml.add_bos_token").boolean("tokenizer.ggml.add_bos_token", true);
       }),
       "bos_token_id"},
      {spm([&](auto& w) { w.erase(kScores); }), "tokenizer.ggml.scores"},
      {spm([&](auto& w) { w.erase(kScores).f32s(kScores, {1.0f}); }), "1 scores"},
      {spm([&](auto& w) { w.erase(kScores).f32s(kScores, nan); }), "score of token 5 is NaN"},
      {spm([&](auto& w) { w.erase(kTypes).i32s(kTypes, std::vector<int32_t>(s.types.size(), 6)); }),
       "not <0xNN>"},
      {spm([&](auto& w) {
         w.erase(kTypes).i32s(kTypes, std::vector<int32_t>(s.types.size(), 1));
         w.erase("tokenizer.ggml.unknown_token_id");
       }),
       "neither all byte tokens nor an unknown token"},
  };
  for (const auto& [writer, says] : cases) {
    try {
      make(writer);
      ADD_FAILURE() << "accepted: " << says;
    } catch (const Error& e) {
      EXPECT_THAT(e.what(), testing::StartsWith("t.gguf: "));
      EXPECT_THAT(e.what(), HasSubstr(says));
      EXPECT_THAT(e.what(), testing::Not(HasSubstr("\n")));
    }
  }
}

TEST(Tokenizers, BadIdsAreRefused) {
  const Tokenizer t = make(BpeVocabulary().file());
  EXPECT_THROW(t.token_bytes(256), Error);
  EXPECT_THROW(t.token_bytes(-1), Error);
  EXPECT_THROW(t.decode(Ids{0, 99999}), Error);
  EXPECT_THROW(t.encode("x", {.add_bos = true}), Error);
  EXPECT_EQ(t.vocab_size(), 256);
  EXPECT_EQ(t.eos(), std::nullopt);
}

// ---- real models

void compare_with_goldens(const Tokenizer& t, const Json& cases, bool special) {
  for (const Json& c : cases) {
    const std::string text = c.at("text");
    const Ids ids = t.encode(text, {.add_bos = false, .parse_special = special});
    EXPECT_EQ(ids, c.at("ids").get<Ids>()) << c.at("text").dump();
    if (!special) {
      EXPECT_EQ(t.decode(ids), text);
    }
    // Streaming gives the same text as decoding at once.
    std::string streamed;
    for (const int32_t id : ids) streamed += t.token_bytes(id);
    EXPECT_EQ(streamed, t.decode(ids));
  }
}

class RealModel : public testing::Test {
 protected:
  // Skips the test without the file.
  void open(const std::string& model, const char* how) {
    const auto path = kSource / "models" / model;
    if (!std::filesystem::exists(path)) GTEST_SKIP() << path << " is not there (" << how << ")";
    file_.emplace(GgufFile::open(path.string()));
    tokenizer_.emplace(Tokenizer::from_gguf(*file_));
  }
  std::optional<GgufFile> file_;
  std::optional<Tokenizer> tokenizer_;
};

TEST_F(RealModel, Qwen2) {
  open("qwen2.5-coder-1.5b.gguf", "tools/fetch_model.sh qwen2.5-coder-1.5b");
  if (!tokenizer_) return;
  const Json golden = read_json(kSource / "tests/engine/data/qwen2_goldens.json");
  ASSERT_GE(golden.at("plain").size(), 60u);
  compare_with_goldens(*tokenizer_, golden.at("plain"), false);
  compare_with_goldens(*tokenizer_, golden.at("special"), true);
  EXPECT_EQ(tokenizer_->vocab_size(), 151936);
  EXPECT_EQ(tokenizer_->eot(), 151645);
  EXPECT_TRUE(tokenizer_->is_end_of_generation(151643));
  EXPECT_FALSE(tokenizer_->adds_bos());
}

TEST_F(RealModel, Gemma3) {
  open("gemma-3-270m.gguf", "tools/fetch_model.sh gemma-3-270m");
  if (!tokenizer_) return;
  const Json golden = read_json(kSource / "tests/engine/data/gemma3_goldens.json");
  ASSERT_GE(golden.at("plain").size(), 60u);
  compare_with_goldens(*tokenizer_, golden.at("plain"), false);
  EXPECT_EQ(tokenizer_->vocab_size(), 262144);
  EXPECT_EQ(tokenizer_->bos(), 2);
  EXPECT_EQ(tokenizer_->eot(), 106);
  EXPECT_TRUE(tokenizer_->adds_bos());
  EXPECT_TRUE(tokenizer_->is_end_of_generation(1));
}

TEST_F(RealModel, Demo) {
  open("demo/thrift-demo.gguf", "part of the repository");
  if (!tokenizer_) return;
  const Json golden = read_json(kSource / "models/demo/tokenizer_goldens.json");
  ASSERT_GE(golden.at("cases").size(), 20u);
  compare_with_goldens(*tokenizer_, golden.at("cases"), false);
}

}  // namespace
}  // namespace thriftattn

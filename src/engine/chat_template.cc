// Chat forms. They are recognised by the control tokens that the file's template mentions.
#include "engine/chat_template.h"

#include <algorithm>
#include <utility>

#include "thriftattn/error.h"

namespace thriftattn {
namespace {

std::string_view trim(std::string_view text) {
  constexpr std::string_view kSpace = " \t\r\n\f\v";
  const size_t begin = text.find_first_not_of(kSpace);
  if (begin == std::string_view::npos) return {};
  return text.substr(begin, text.find_last_not_of(kSpace) - begin + 1);
}

// Collects pieces; neighbouring texts become one, because words may span them.
class Builder {
 public:
  explicit Builder(ChatForm form) { chat_.form = form; }
  void special(std::string_view token) {
    chat_.pieces.push_back({std::string(token), true});
    chat_.parse_special = true;
  }
  void text(std::string_view text) {
    if (text.empty()) return;
    const bool apart =
        chat_.pieces.empty() || chat_.pieces.back().special || chat_.pieces.back().ends_document;
    if (apart) chat_.pieces.push_back({});
    chat_.pieces.back().text += text;
  }
  // A user's text whose first `document` bytes are a document; `trimmed` as some forms want it.
  void user_text(std::string_view whole, size_t document, bool trimmed) {
    const std::string_view text = trimmed ? trim(whole) : whole;
    const size_t skipped = text.empty() ? 0 : static_cast<size_t>(text.data() - whole.data());
    const size_t cut = document > skipped ? std::min(document - skipped, text.size()) : 0;
    this->text(text.substr(0, cut));
    if (cut > 0) end_document();
    this->text(text.substr(cut));
  }
  void end_document() {
    if (!chat_.pieces.empty()) chat_.pieces.back().ends_document = true;
  }
  FormattedChat take() { return std::move(chat_); }

 private:
  FormattedChat chat_;
};

struct Turn {
  std::string role;
  std::string content;
  size_t document = 0;  // bytes of `content` that are a document, the empty line included
};

// Folds documents into the user messages that follow them, and checks the roles.
std::vector<Turn> fold_documents(const std::vector<ChatMessage>& messages) {
  std::vector<Turn> out;
  std::string document;
  for (const ChatMessage& m : messages) {
    if (m.role == "document") {
      document += m.content + "\n\n";
    } else if (m.role == "user") {
      const size_t bytes = document.size();
      out.push_back({m.role, std::exchange(document, {}) + m.content, bytes});
    } else if (m.role == "system" || m.role == "assistant") {
      out.push_back({m.role, m.content});
    } else {
      throw Error(ErrorCode::invalid_argument,
                  "role '" + printable(m.role) +
                      "' of a chat message is not known; use system, user, assistant or document");
    }
  }
  if (!document.empty()) out.push_back({"user", std::string(trim(document))});
  return out;
}

FormattedChat plain(const std::vector<ChatMessage>& messages, bool add_generation_prompt) {
  Builder b(ChatForm::plain);
  for (const ChatMessage& m : messages) {
    if (m.role == "user") {
      b.text("Question: ");
      b.text(m.content);
      b.text("\n");
    } else if (m.role == "assistant") {
      b.text("Answer: ");
      b.text(m.content);
      b.text("\n\n");
    } else {
      b.text(m.content);
      b.text("\n\n");
      if (m.role == "document") b.end_document();
    }
  }
  if (add_generation_prompt) b.text("Answer:");
  return b.take();
}

FormattedChat chatml(const std::vector<Turn>& messages, bool add_generation_prompt) {
  Builder b(ChatForm::chatml);
  for (const Turn& m : messages) {
    b.special("<|im_start|>");
    b.text(m.role + "\n");
    b.user_text(m.content, m.document, false);
    b.special("<|im_end|>");
    b.text("\n");
  }
  if (add_generation_prompt) {
    b.special("<|im_start|>");
    b.text("assistant\n");
  }
  return b.take();
}

FormattedChat llama3(const std::vector<Turn>& messages, bool add_generation_prompt) {
  Builder b(ChatForm::llama3);
  const auto header = [&](std::string_view role) {
    b.special("<|start_header_id|>");
    b.text(role);
    b.special("<|end_header_id|>");
    b.text("\n\n");
  };
  for (const Turn& m : messages) {
    header(m.role);
    b.user_text(m.content, m.document, true);
    b.special("<|eot_id|>");
  }
  if (add_generation_prompt) header("assistant");
  return b.take();
}

FormattedChat gemma(const std::vector<Turn>& messages, bool add_generation_prompt) {
  Builder b(ChatForm::gemma);
  std::string system;  // has no turn of its own: it begins the next user turn
  for (const Turn& m : messages) {
    if (m.role == "system") {
      system += std::string(trim(m.content)) + "\n\n";
      continue;
    }
    b.special("<start_of_turn>");
    b.text(m.role == "assistant" ? "model\n" : "user\n");
    if (m.role == "user") b.text(std::exchange(system, {}));
    b.user_text(m.content, m.document, true);
    b.special("<end_of_turn>");
    b.text("\n");
  }
  if (add_generation_prompt) {
    b.special("<start_of_turn>");
    b.text("model\n");
  }
  return b.take();
}

// The system message that a ChatML template writes if none is given: the literal text between
// "<|im_start|>system\n" (with the line break as Jinja escapes it) and "<|im_end|>".
std::string_view default_system_of(std::string_view chat_template) {
  constexpr std::string_view kBegin = "<|im_start|>system";
  for (size_t at = 0; (at = chat_template.find(kBegin, at)) != std::string_view::npos;) {
    at += kBegin.size();
    std::string_view rest = chat_template.substr(at);
    if (rest.starts_with("\\n")) {
      rest.remove_prefix(2);
    } else if (rest.starts_with("\n")) {
      rest.remove_prefix(1);
    }
    const std::string_view text = rest.substr(0, rest.find("<|im_end|>"));
    const bool literal =
        text.size() < rest.size() && text.find_first_of("{}'\"+\\\n") == std::string_view::npos;
    if (literal && !text.empty()) return text;
  }
  return {};
}

}  // namespace

std::string FormattedChat::text() const {
  std::string all;
  for (const ChatPiece& piece : pieces) all += piece.text;
  return all;
}

ChatForm detect_chat_form(const GgufFile& file) {
  const std::string_view t = file.find_string("tokenizer.chat_template").value_or("");
  const auto mentions = [&](std::string_view token) {
    return t.find(token) != std::string_view::npos;
  };
  if (mentions("<|im_start|>")) return ChatForm::chatml;
  if (mentions("<|start_header_id|>")) return ChatForm::llama3;
  if (mentions("<start_of_turn>")) return ChatForm::gemma;
  // A file without a template is of a base model, unless its name says that it was tuned.
  if (!t.empty()) return ChatForm::plain;
  std::string name;
  for (const char* key : {"general.name", "general.finetune", "general.basename"}) {
    name += " " + std::string(file.find_string(key).value_or(""));
  }
  std::transform(name.begin(), name.end(), name.begin(),
                 [](char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c + 32) : c; });
  name += " ";
  const bool tuned =
      name.find("instruct") != std::string::npos || name.find("chat") != std::string::npos ||
      name.find(" it ") != std::string::npos || name.find("-it ") != std::string::npos;
  const std::string_view architecture = file.find_string("general.architecture").value_or("");
  if (!tuned) return ChatForm::plain;
  if (architecture == "gemma3") return ChatForm::gemma;
  if (architecture == "qwen2" || architecture == "qwen3") return ChatForm::chatml;
  if (architecture == "llama" &&
      file.find_string("tokenizer.ggml.pre").value_or("") == "llama-bpe") {
    return ChatForm::llama3;
  }
  return ChatForm::plain;
}

std::string_view chat_form_name(ChatForm form) {
  switch (form) {
    case ChatForm::chatml:
      return "chatml";
    case ChatForm::llama3:
      return "llama3";
    case ChatForm::gemma:
      return "gemma";
    case ChatForm::plain:
      break;
  }
  return "plain";
}

FormattedChat format_chat(ChatForm form, const std::vector<ChatMessage>& messages,
                          bool add_generation_prompt, std::string_view default_system) {
  std::vector<Turn> folded = fold_documents(messages);
  switch (form) {
    case ChatForm::chatml:
      if (!default_system.empty() && (folded.empty() || folded[0].role != "system")) {
        folded.insert(folded.begin(), {"system", std::string(default_system)});
      }
      return chatml(folded, add_generation_prompt);
    case ChatForm::llama3:
      return llama3(folded, add_generation_prompt);
    case ChatForm::gemma:
      return gemma(folded, add_generation_prompt);
    case ChatForm::plain:
      break;
  }
  return plain(messages, add_generation_prompt);
}

FormattedChat format_chat(const GgufFile& file, const std::vector<ChatMessage>& messages,
                          bool add_generation_prompt) {
  return format_chat(detect_chat_form(file), messages, add_generation_prompt,
                     default_system_of(file.find_string("tokenizer.chat_template").value_or("")));
}

FormattedChat format_next_turn(ChatForm form, std::string_view question) {
  Builder end(form);
  switch (form) {
    case ChatForm::chatml:
      end.special("<|im_end|>");
      end.text("\n");
      break;
    case ChatForm::llama3:
      end.special("<|eot_id|>");
      break;
    case ChatForm::gemma:
      end.special("<end_of_turn>");
      end.text("\n");
      break;
    case ChatForm::plain:
      end.text("\n\n");
      break;
  }
  FormattedChat chat = end.take();
  const FormattedChat next = format_chat(form, {{"user", std::string(question)}}, true);
  chat.pieces.insert(chat.pieces.end(), next.pieces.begin(), next.pieces.end());
  chat.parse_special = chat.parse_special || next.parse_special;
  return chat;
}

ChatTokens encode_chat_parts(const Tokenizer& tokenizer, const FormattedChat& chat, bool begins) {
  ChatTokens out;
  if (begins) out.tokens = tokenizer.encode("");
  bool continues = !begins;
  for (const ChatPiece& piece : chat.pieces) {
    const auto part = tokenizer.encode(
        piece.text, {.add_bos = false, .parse_special = piece.special, .continues = continues});
    if (piece.special && part.size() != 1) {
      throw Error(ErrorCode::unsupported,
                  "the vocabulary has no token " + printable(piece.text) +
                      " that the model's chat form needs; ask without the chat form");
    }
    out.tokens.insert(out.tokens.end(), part.begin(), part.end());
    if (piece.ends_document) out.document = out.tokens.size();
    continues = piece.ends_document;
  }
  return out;
}

std::vector<int32_t> encode_chat(const Tokenizer& tokenizer, const FormattedChat& chat) {
  return encode_chat_parts(tokenizer, chat).tokens;
}

}  // namespace thriftattn

def write_sums(d, s):
    t = d / "SHA256SUMS.tmp"
    t.write_text("".join(f"{h}  {n}\n" for n, h in s.items()))
    t.replace(d / "SHA256SUMS")

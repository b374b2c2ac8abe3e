"""Passwords that are guessed first and fit the rule of eight characters with a letter and a digit. Case-folded."""

COMMON_PASSWORDS = frozenset(
    """
    password0 password1 password2 password3 password7 password9 password01 password10 password11 password12 password13
    password21 password22 password69 password99 password111 password123 password321 password1234 password12345
    password123456 password123! password1! password2024 password2025 password2026 passw0rd p@ssw0rd p@ssword1
    passw0rd1 passw0rd! p@ssw0rd1 p@ssw0rd! p4ssw0rd pa55word pa55w0rd pass1234 pass12345 pass123456 mypassword1
    1password 123password changeme1 changeme123 letmein1 letmein12 letmein123 welcome1 welcome12 welcome123 welcome1!
    welcome2024 welcome2025 welcome2026 qwerty12 qwerty123 qwerty1234 qwerty12345 qwerty123456 qwerty123! 123qwerty
    qwer1234 1234qwer qwertyuiop1 qwe12345 qwe123qwe 123qwe123 1q2w3e4r 1q2w3e4r5t 1q2w3e4r5t6y q1w2e3r4 q1w2e3r4t5
    1qaz2wsx 1qaz2wsx3edc 1qazxsw2 zaq12wsx zaq1zaq1 !qaz2wsx qazwsx12 qazwsx123 asdf1234 asdfgh12 asdfghjkl1 asdf12345
    zxcvbnm1 zxcvbnm123 abcd1234 1234abcd abc12345 abc123456 abcde123 abcdef12 abcdefg1 abcdefgh1 abc123abc 123abc123
    a1b2c3d4 a1b2c3d4e5 a1234567 a12345678 a123456789 aa123456 aa12345678 aaa11111 1234567a 12345678a 123456789a
    12345678q 123456789q 0123456789a 1234567890a 123456aa 123456ab 123456abc 12345abc 12345qwert 123456qwerty 12341234a
    11111111a q1234567 q12345678 q123456789 z1234567 x1234567 admin123 admin1234 admin12345 administrator1 root1234
    user1234 test1234 test12345 test123456 testing1 testing123 guest1234 demo1234 login123 secret12 secret123 secret1234
    iloveyou1 iloveyou2 iloveyou12 iloveyou123 sunshine1 princess1 superman1 spiderman1 batman123 pokemon1 pokemon123
    football1 football12 baseball1 basketball1 liverpool1 chelsea1 arsenal1 barcelona1 monkey12 monkey123 dragon12
    dragon123 master12 master123 shadow12 shadow123 michael1 jessica1 charlie1 jordan23 ashley12 samsung1 samsung123
    google123 computer1 internet1 killer123 starwars1 whatever1 trustno1 nothing1 freedom1 hello123 hello1234 hello12345
    blink182 babygirl1 butterfly1 flower123 summer123 summer2024 summer2025 summer2026 winter2024 winter2025 winter2026
    spring2026 autumn2026 january1 december1 azerty123 azertyuiop1 motdepasse1 passwort1 passwort123 hallo123
    contraseña1 contrasena1 senha123 senha1234 parola123 parley123 parley1234 parley12345 parley2026 parleyparley1
    """.split()  # noqa: SIM905 - one word per line would be 200 lines
)
